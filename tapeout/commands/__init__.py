"""The verbs of the command line: each reads its arguments, makes one call and prints. Human output goes to stderr."""
