"""What ``text2sql`` is asked: tables, and questions about them with the SQL that answers each."""

from __future__ import annotations

import random
import zlib
from typing import NamedTuple

from tapeout.embedded.training import Sample

SAMPLES = 20_800
HELD_OUT = 100
ONE_IN = 10  # one query shape in so many is held out


class Column(NamedTuple):
    """A column of text or of numbers.

    Attributes:
        name: in SQL; in a question ``_`` is a space.
        words: the values of a column of text.
        numbers: those of a column of numbers.
    """

    name: str
    words: tuple[str, ...] = ()
    numbers: range = range(0)

    @property
    def said(self) -> str:
        """The name as a question says it."""
        return self.name.replace("_", " ")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


CITIES = _words(
    "Athens Berlin Boston Cairo Chicago Delhi Dublin Geneva Hamburg Lagos Lima Lisbon London Madrid Milan Nairobi "
    "Osaka Oslo Paris Prague Quito Rome Seoul Sydney Tokyo Toronto Vienna Warsaw"
)
COUNTRIES = _words(
    "Argentina Austria Brazil Canada Chile China Denmark Egypt France Germany Greece India Italy Japan Kenya Mexico "
    "Norway Peru Poland Portugal Spain Sweden Turkey Vietnam"
)
PEOPLE = _words(
    "Adams Baker Clark Davis Evans Fischer Garcia Hughes Ivanov Jones Kumar Lopez Meyer Nguyen Okafor Patel Quinn Rossi "
    "Sato Tanaka Usman Varga Weber Young Zhang"
)
COLOURS = _words("black blue brown green grey orange pink purple red silver white yellow")

TABLES: dict[str, tuple[Column, ...]] = {
    "books": (
        Column("author", PEOPLE),
        Column("genre", _words("biography comedy crime fantasy history poetry romance travel")),
        Column("language", _words("Arabic Dutch English French German Hindi Korean Spanish")),
        Column("pages", numbers=range(50, 1050, 50)),
        Column("year", numbers=range(1980, 2026)),
    ),
    "cars": (
        Column("maker", _words("Audi Fiat Ford Honda Kia Mazda Skoda Tesla Toyota Volvo")),
        Column("colour", COLOURS),
        Column("fuel", _words("diesel electric hybrid hydrogen petrol")),
        Column("price", numbers=range(5000, 95000, 5000)),
        Column("seats", numbers=range(2, 10)),
    ),
    "employees": (
        Column("name", PEOPLE),
        Column("department", _words("design finance legal marketing research sales support")),
        Column("city", CITIES),
        Column("salary", numbers=range(2000, 9250, 250)),
        Column("age", numbers=range(18, 68)),
    ),
    "flights": (
        Column("airline", _words("Aeroflot Delta Emirates Iberia Lufthansa Qantas Ryanair United")),
        Column("origin", CITIES),
        Column("destination", CITIES),
        Column("distance", numbers=range(250, 5250, 250)),
        Column("delay", numbers=range(5, 125, 5)),
    ),
    "hotels": (
        Column("city", CITIES),
        Column("country", COUNTRIES),
        Column("owner", PEOPLE),
        Column("rooms", numbers=range(10, 410, 10)),
        Column("stars", numbers=range(1, 6)),
    ),
    "movies": (
        Column("director", PEOPLE),
        Column("genre", _words("action comedy crime drama fantasy horror romance western")),
        Column("country", COUNTRIES),
        Column("length", numbers=range(60, 250, 10)),
        Column("budget", numbers=range(5, 105, 5)),
    ),
    "orders": (
        Column("customer", PEOPLE),
        Column("product", _words("bed chair clock desk lamp mirror shelf sofa table")),
        Column("status", _words("cancelled delivered open paid returned shipped")),
        Column("quantity", numbers=range(1, 51)),
        Column("total_price", numbers=range(50, 2050, 50)),
    ),
    "players": (
        Column("name", PEOPLE),
        Column("team", _words("Bears Eagles Falcons Giants Hawks Lions Rockets Sharks Tigers")),
        Column("position", _words("centre defender forward goalkeeper striker winger")),
        Column("goals", numbers=range(61)),
        Column("shirt_number", numbers=range(1, 100)),
    ),
    "products": (
        Column("brand", _words("Acme Apex Globex Hooli Initech Nimbus Orbit Umbra Vertex")),
        Column("colour", COLOURS),
        Column("material", _words("cotton glass leather paper plastic steel wood wool")),
        Column("weight", numbers=range(100, 3100, 100)),
        Column("price", numbers=range(10, 510, 10)),
    ),
    "students": (
        Column("name", PEOPLE),
        Column("subject", _words("art biology chemistry economics geography law maths physics")),
        Column("country", COUNTRIES),
        Column("grade", numbers=range(1, 101)),
        Column("age", numbers=range(16, 41)),
    ),
}  # fmt: skip

FUNCTIONS = {
    "AVG": ("average", "mean"),
    "MAX": ("highest", "largest", "maximum"),
    "MIN": ("lowest", "smallest", "minimum"),
    "SUM": ("total", "combined"),
}
COMPARISONS = {
    "=": ("is {}", "equals {}", "is exactly {}"),
    "!=": ("is not {}", "differs from {}", "is other than {}"),
    ">": ("is above {}", "is more than {}", "is over {}", "exceeds {}"),
    "<": ("is below {}", "is less than {}", "is under {}"),
    ">=": ("is at least {}", "is {} or more"),
    "<=": ("is at most {}", "is {} or less"),
}
EQUALITIES = ("=", "!=")  # all that is asked of text
COLUMN_HEADS = ("show the {} of {}", "list the {} of all {}", "what is the {} of {}", "give me the {} of {}", "find the {} for {}")  # fmt: skip
ALL_HEADS = ("show all {}", "list the {}", "find all {}", "which are the {}", "give me all {}")
COUNT_HEADS = (
    "how many {} are there",
    "count the {}",
    "what is the number of {}",
    "give me the number of {}",
)
FUNCTION_HEADS = ("what is the {} {} of {}", "find the {} {} of all {}", "show the {} {} of {}", "compute the {} {} for {}")  # fmt: skip


class Condition(NamedTuple):
    """``column operator value``."""

    column: Column
    operator: str
    value: str

    @property
    def sql(self) -> str:
        """As SQL; text stands between quotes."""
        value = f"'{self.value}'" if self.column.words else self.value
        return f"{self.column.name} {self.operator} {value}"


class Query(NamedTuple):
    """One SELECT.

    Attributes:
        table: one of TABLES.
        function: of FUNCTIONS, COUNT, or none.
        columns: that are selected; none: all of them, or the rows that COUNT counts.
        conditions: one or two.
        connective: AND or OR.
    """

    table: str
    function: str
    columns: tuple[str, ...]
    conditions: tuple[Condition, ...]
    connective: str

    @property
    def _selected(self) -> str:
        columns = ", ".join(self.columns) or "*"
        return f"{self.function}({columns})" if self.function else columns

    @property
    def sql(self) -> str:
        """The whole statement."""
        conditions = f" {self.connective} ".join(condition.sql for condition in self.conditions)
        return f"SELECT {self._selected} FROM {self.table} WHERE {conditions}"

    @property
    def held_out(self) -> bool:
        """Whether queries of this shape are kept from training: all of the statement but the values."""
        conditions = f" {self.connective} ".join(f"{c.column.name} {c.operator}" for c in self.conditions)
        shape = f"SELECT {self._selected} FROM {self.table} WHERE {conditions}"
        return zlib.crc32(shape.encode()) % ONE_IN == 0


def _condition(rng: random.Random, column: Column) -> Condition:
    if column.words:
        return Condition(column, rng.choice(EQUALITIES), rng.choice(column.words))
    return Condition(column, rng.choice(tuple(COMPARISONS)), str(rng.choice(column.numbers)))


def draw(rng: random.Random) -> Query:
    """One query: the table, what is selected, one or two conditions on different columns."""
    table = rng.choice(tuple(TABLES))
    columns = TABLES[table]
    kind = rng.choice(("columns", "columns", "all", "count", "function"))
    function = ""
    selected: tuple[str, ...] = ()
    if kind == "columns":
        selected = tuple(column.name for column in rng.sample(columns, rng.choice((1, 2))))
    elif kind == "count":
        function = "COUNT"
    elif kind == "function":
        function = rng.choice(tuple(FUNCTIONS))
        selected = (rng.choice([column.name for column in columns if not column.words]),)
    asked = rng.sample(columns, rng.choice((1, 2)))
    return Query(
        table,
        function,
        selected,
        tuple(_condition(rng, column) for column in asked),
        rng.choice(("AND", "OR")) if len(asked) == 2 else "",
    )


def _head(rng: random.Random, query: Query) -> str:
    columns = " and ".join(column.replace("_", " ") for column in query.columns)
    if query.function == "COUNT":
        return rng.choice(COUNT_HEADS).format(query.table)
    if query.function:
        return rng.choice(FUNCTION_HEADS).format(rng.choice(FUNCTIONS[query.function]), columns, query.table)
    if columns:
        return rng.choice(COLUMN_HEADS).format(columns, query.table)
    return rng.choice(ALL_HEADS).format(query.table)


def ask(rng: random.Random, query: Query) -> Sample:
    """A question for the query in one of its phrasings, and the SQL."""
    told = [c.said + " " + rng.choice(COMPARISONS[o]).format(v) for c, o, v in query.conditions]
    first = rng.choice(("whose", "where", "where the"))
    rest = "".join(
        f" {query.connective.lower()} {rng.choice(('', 'the '))}{condition}" for condition in told[1:]
    )
    return Sample(f"{_head(rng, query)} {first} {told[0]}{rest} <sep>", f" {query.sql}")


def samples() -> tuple[list[Sample], list[Sample]]:
    """Return the samples to train on and those held out, whose query's shape never occurs in training."""
    rng = random.Random(0)
    trained: list[Sample] = []
    held_out: dict[Sample, None] = {}
    while len(trained) < SAMPLES or len(held_out) < HELD_OUT:
        query = draw(rng)
        sample = ask(rng, query)
        if query.held_out:
            if len(held_out) < HELD_OUT:
                held_out[sample] = None
        elif len(trained) < SAMPLES:
            trained.append(sample)
    return trained, list(held_out)
