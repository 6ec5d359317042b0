// Check this package on a device that has llama.cpp and no Python: its files, its logits, its speed. What check.py does, in C++17.
//
// Build it against llama.cpp (of July 2025 or newer; L is where it was built, and its sources are beside it), and run it in the package:
//
//     c++ -std=c++17 -O2 check.cpp -o check -I L/../include -I L/../ggml/include -L L/bin -Wl,-rpath,L/bin -lllama -lggml -lggml-base
//     ./check
//
// usage: check [PACKAGE] [--out FILE]      default: this directory, and device_report.json in it
// `tapeout validate DIR --device-report FILE` puts what it found into the package's report.
// Exit status: 0 everything passed, 1 a gate failed, 2 this is no package or bad usage, 3 it is of another runtime.

#include "llama.h"

#ifdef __linux__
#include <sched.h>
#endif
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iostream>
#include <map>
#include <random>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace fs = std::filesystem;
using Row = std::vector<float>;
using Ids = std::vector<llama_token>;

static const double GOLDEN_LIMIT = 2e-3;  // nats; the report's own bound where that is larger
static const int TAIL = 32, LONGEST = 1024, CHUNK = 64, BATCH = 512;
static const int NEW_TOKENS = 32, REPEATS = 3, RUNS = 20;

struct Stop : std::runtime_error {
    int status;
    Stop(int status, const std::string & text) : std::runtime_error(text), status(status) {}
};

// JSON, with numbers as they are written, so that what was read is written again byte for byte

struct Json {
    enum Kind { Null, Bool, Number, String, List, Object } kind = Null;
    std::string text;  // of a string its value, of the others but list and object their token
    std::vector<Json> items;
    std::map<std::string, Json> fields;  // bytes of UTF-8 sort as code points do

    const Json & at(const std::string & key) const {
        auto found = fields.find(key);
        if (kind != Object || found == fields.end()) throw std::runtime_error("it has no \"" + key + "\"");
        return found->second;
    }
    const std::string & string() const {
        if (kind != String) throw std::runtime_error("a string is expected");
        return text;
    }
    double number() const {
        if (kind != Number) throw std::runtime_error("a number is expected");
        return std::stod(text);
    }
    bool has(const std::string & key) const { return fields.count(key) > 0; }
};

struct JsonReader {
    const std::string & data;
    size_t at = 0;
    int depth = 0;

    [[noreturn]] void fail() { throw std::runtime_error("no JSON at byte " + std::to_string(at)); }
    void space() { while (at < data.size() && std::strchr(" \t\r\n", data[at]) && data[at]) at++; }
    char next() { return at < data.size() ? data[at] : '\0'; }
    void expect(char c) { if (next() != c) fail(); at++; }

    unsigned hex() {
        unsigned value = 0;
        for (int i = 0; i < 4; i++) {
            const char c = next();
            const char * digits = "0123456789abcdef";
            const char * place = c ? std::strchr(digits, std::tolower(c)) : nullptr;
            if (!place) fail();
            value = 16 * value + unsigned(place - digits);
            at++;
        }
        return value;
    }
    std::string string() {
        std::string out;
        expect('"');
        while (next() != '"') {
            if (at >= data.size()) fail();
            if (next() != '\\') { out += data[at++]; continue; }
            at++;
            const char c = next();
            at++;
            const char * plain = "\"\\/bfnrt", * meant = "\"\\/\b\f\n\r\t";
            if (c != 'u') {
                const char * place = c ? std::strchr(plain, c) : nullptr;
                if (!place) fail();
                out += meant[place - plain];
                continue;
            }
            unsigned point = hex();
            if (point >= 0xd800 && point < 0xdc00) {
                expect('\\'); expect('u');
                point = 0x10000 + ((point - 0xd800) << 10) + (hex() - 0xdc00);
            }
            if (point < 0x80) out += char(point);
            else if (point < 0x800) { out += char(0xc0 | point >> 6); out += char(0x80 | (point & 63)); }
            else if (point < 0x10000) { out += char(0xe0 | point >> 12); out += char(0x80 | (point >> 6 & 63)); out += char(0x80 | (point & 63)); }
            else { out += char(0xf0 | point >> 18); out += char(0x80 | (point >> 12 & 63)); out += char(0x80 | (point >> 6 & 63)); out += char(0x80 | (point & 63)); }
        }
        at++;
        return out;
    }
    Json value() {
        if (++depth > 100) fail();
        Json out;
        space();
        const char c = next();
        if (c == '{' || c == '[') {
            const char close = c == '{' ? '}' : ']';
            out.kind = c == '{' ? Json::Object : Json::List;
            at++; space();
            while (next() != close) {
                if (out.kind == Json::Object) {
                    space();
                    const std::string key = string();
                    space(); expect(':');
                    out.fields[key] = value();
                } else out.items.push_back(value());
                space();
                if (next() == ',') { at++; space(); if (next() == close) fail(); } else if (next() != close) fail();
            }
            at++;
        } else if (c == '"') {
            out.kind = Json::String;
            out.text = string();
        } else {
            const size_t begin = at;
            while (at < data.size() && (std::isalnum((unsigned char) data[at]) || std::strchr("+-.", data[at]))) at++;
            out.text = data.substr(begin, at - begin);
            if (out.text == "null") out.kind = Json::Null;
            else if (out.text == "true" || out.text == "false") out.kind = Json::Bool;
            else if (!out.text.empty() && (std::isdigit((unsigned char) out.text[0]) || out.text[0] == '-')) out.kind = Json::Number;
            else fail();
        }
        depth--;
        return out;
    }
};

static Json parsed(const std::string & data) {
    JsonReader reader{data};
    Json out = reader.value();
    reader.space();
    if (reader.at != data.size()) reader.fail();
    return out;
}

static std::string quoted(const std::string & text) {
    std::string out = "\"";
    for (const unsigned char c : text) {
        const char * plain = "\"\\\b\f\n\r\t", * letter = "\"\\bfnrt";
        const char * place = c ? std::strchr(plain, c) : nullptr;
        char code[8];
        if (place) { out += '\\'; out += letter[place - plain]; }
        else if (c < 0x20) { std::snprintf(code, sizeof code, "\\u%04x", c); out += code; }
        else out += char(c);
    }
    return out + "\"";
}

// As Python writes it with an indent of 1: what the root digest is of.
static std::string written(const Json & value, int indent = 0) {
    const std::string inner(indent + 1, ' '), outer(indent, ' ');
    std::string out, between;
    if (value.kind == Json::String) return quoted(value.text);
    if (value.kind == Json::List) {
        if (value.items.empty()) return "[]";
        for (const Json & item : value.items) { out += between + "\n" + inner + written(item, indent + 1); between = ","; }
        return "[" + out + "\n" + outer + "]";
    }
    if (value.kind == Json::Object) {
        if (value.fields.empty()) return "{}";
        for (const auto & [key, item] : value.fields) { out += between + "\n" + inner + quoted(key) + ": " + written(item, indent + 1); between = ","; }
        return "{" + out + "\n" + outer + "}";
    }
    return value.text;
}

// SHA-256 (FIPS 180-4)

struct Sha256 {
    uint32_t h[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    uint8_t block[64];
    uint64_t length = 0;

    static uint32_t turned(uint32_t x, int n) { return x >> n | x << (32 - n); }
    void compress(const uint8_t * p) {
        static const uint32_t k[64] = {
            0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be,
            0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa,
            0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967, 0x27b70a85,
            0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3,
            0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f,
            0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};
        uint32_t w[64], v[8];
        for (int i = 0; i < 16; i++) w[i] = uint32_t(p[4 * i]) << 24 | uint32_t(p[4 * i + 1]) << 16 | uint32_t(p[4 * i + 2]) << 8 | p[4 * i + 3];
        for (int i = 16; i < 64; i++) {
            const uint32_t a = turned(w[i - 15], 7) ^ turned(w[i - 15], 18) ^ w[i - 15] >> 3;
            const uint32_t b = turned(w[i - 2], 17) ^ turned(w[i - 2], 19) ^ w[i - 2] >> 10;
            w[i] = w[i - 16] + a + w[i - 7] + b;
        }
        std::memcpy(v, h, sizeof v);
        for (int i = 0; i < 64; i++) {
            const uint32_t e = v[4], a = v[0];
            const uint32_t one = v[7] + (turned(e, 6) ^ turned(e, 11) ^ turned(e, 25)) + ((e & v[5]) ^ (~e & v[6])) + k[i] + w[i];
            const uint32_t two = (turned(a, 2) ^ turned(a, 13) ^ turned(a, 22)) + ((a & v[1]) ^ (a & v[2]) ^ (v[1] & v[2]));
            for (int j = 7; j > 0; j--) v[j] = v[j - 1];
            v[4] += one;
            v[0] = one + two;
        }
        for (int i = 0; i < 8; i++) h[i] += v[i];
    }
    void add(const char * data, size_t size) {
        for (size_t i = 0; i < size;) {
            const size_t used = length % 64, take = std::min<size_t>(64 - used, size - i);
            std::memcpy(block + used, data + i, take);
            length += take; i += take;
            if (length % 64 == 0) compress(block);
        }
    }
    std::string hex() {
        const uint64_t bits = 8 * length;
        add("\x80", 1);
        while (length % 64 != 56) add("\0", 1);
        char end[8], text[65];
        for (int i = 0; i < 8; i++) end[i] = char(bits >> (56 - 8 * i));
        add(end, 8);
        for (int i = 0; i < 8; i++) std::snprintf(text + 8 * i, 9, "%08x", h[i]);
        return text;
    }
};

// Files

static std::string read_all(const fs::path & path) {
    std::ifstream file(path, std::ios::binary);
    std::ostringstream out;
    if (!file || !(out << file.rdbuf())) throw std::runtime_error(path.string() + " cannot be read");
    return out.str();
}

static std::string sha256_of(const fs::path & path) {
    std::ifstream file(path, std::ios::binary);
    std::vector<char> buffer(1 << 20);
    Sha256 digest;
    while (file.read(buffer.data(), std::streamsize(buffer.size())), file.gcount() > 0) digest.add(buffer.data(), size_t(file.gcount()));
    return digest.hex();
}

static Json read_manifest(const fs::path & root) {
    const fs::path path = root / "tapeout.json";
    if (!fs::exists(path)) throw Stop(2, root.string() + " is not a package: it has no tapeout.json.");
    Json manifest;
    double version = 0;
    std::string format;
    try {
        manifest = parsed(read_all(path));
        version = manifest.at("format_version").number();
        format = manifest.at("artifact").at("format").string();
        manifest.at("root_sha256").string(); manifest.at("model");
        for (const char * part : {"files", "beside"}) {
            if (manifest.at(part).kind != Json::Object) throw std::runtime_error(std::string(part) + " is no object");
            for (const auto & [name, entry] : manifest.at(part).fields) { entry.at("size").number(); entry.at("sha256").string(); }
        }
    } catch (const std::exception & error) {
        throw Stop(2, path.string() + " cannot be read as a manifest: " + error.what() + ".");
    }
    if (version > 1) throw Stop(2, path.string() + " is of a newer format than this program reads.");
    if (format != "gguf") throw Stop(2, root.string() + " holds an artifact of format " + format + "; this program runs gguf.");
    return manifest;
}

// What is not as the manifest says, one phrase each.
static std::vector<std::string> damage(const fs::path & root, const Json & manifest) {
    std::vector<std::string> found;
    const std::string inside = fs::canonical(root).string() + "/";
    for (const char * part : {"files", "beside"}) {
        for (const auto & [name, entry] : manifest.at(part).fields) {
            const fs::path path = root / name;
            std::error_code none;
            if (fs::path(name).is_absolute() || (fs::weakly_canonical(path, none).string() + "/").rfind(inside, 0) != 0)
                found.push_back("'" + name + "' leads out of the package");
            else if (!fs::is_regular_file(path)) found.push_back(name + " is missing");
            else if (double(fs::file_size(path)) != entry.at("size").number())
                found.push_back(name + " has " + std::to_string(fs::file_size(path)) + " bytes instead of " + entry.at("size").text);
            else if (sha256_of(path) != entry.at("sha256").text) found.push_back(name + " differs from its digest");
        }
    }
    Json covered = manifest;
    for (const char * key : {"root_sha256", "beside", "passed"}) covered.fields.erase(key);
    const std::string text = written(covered) + "\n";
    Sha256 digest;
    digest.add(text.data(), text.size());
    if (digest.hex() != manifest.at("root_sha256").text) found.push_back("tapeout.json differs from its root digest");
    return found;
}

struct Prompt { Ids ids; Row row; };

// golden.safetensors: eight bytes of length, a JSON header, the data; tokens.N int32 and the float32 logits.N that must follow.
static std::vector<Prompt> golden_of(const fs::path & root) {
    std::vector<Prompt> out;
    if (!fs::exists(root / "golden.safetensors")) return out;
    const std::string data = read_all(root / "golden.safetensors");
    uint64_t length = 0;
    if (data.size() < 8) throw std::runtime_error("golden.safetensors is cut short");
    for (int i = 7; i >= 0; i--) length = length << 8 | uint8_t(data[size_t(i)]);
    if (length > data.size() - 8) throw std::runtime_error("golden.safetensors is cut short");
    const Json header = parsed(data.substr(8, length));
    auto copied = [&](const std::string & name, const char * kind, auto & into) {
        const Json & entry = header.at(name);
        const double first = entry.at("data_offsets").items.at(0).number(), last = entry.at("data_offsets").items.at(1).number();
        if (entry.at("dtype").string() != kind || first < 0 || last < first || 8 + double(length) + last > double(data.size()))
            throw std::runtime_error(name + " of golden.safetensors is not as it should be");
        into.resize(size_t(last - first) / sizeof(into[0]));
        std::memcpy(into.data(), data.data() + 8 + length + size_t(first), into.size() * sizeof(into[0]));
    };
    for (int at = 0; header.has("tokens." + std::to_string(at)); at++) {
        Prompt prompt;
        copied("tokens." + std::to_string(at), "I32", prompt.ids);
        copied("logits." + std::to_string(at), "F32", prompt.row);
        out.push_back(prompt);
    }
    return out;
}

static double limit_of(const fs::path & root) {
    double limit = GOLDEN_LIMIT;
    if (!fs::exists(root / "report.json")) return limit;
    const Json report = parsed(read_all(root / "report.json"));
    for (const Json & gate : report.at("gates").items)
        if (gate.at("name").string() == "lowering/runtime" && gate.at("limit").kind == Json::Number) limit = std::max(limit, gate.at("limit").number());
    return limit;
}

// Distances

struct Distance { double kl = 0, cosine = 0, top1 = 0, worst = 0; };

static std::vector<double> log_softmax(const Row & row) {
    const double most = *std::max_element(row.begin(), row.end());
    double sum = 0;
    for (const float value : row) sum += std::exp(value - most);
    std::vector<double> out;
    for (const float value : row) out.push_back(value - most - std::log(sum));
    return out;
}

static Distance distance(const std::vector<Row> & expected, const std::vector<Row> & found) {
    Distance out;
    for (size_t at = 0; at < expected.size(); at++) {
        const Row & one = expected[at], & other = found[at];
        if (one.size() != other.size() || one.empty())
            throw std::runtime_error("the device gives " + std::to_string(other.size()) + " values where " + std::to_string(one.size()) + " are expected");
        for (const float value : other) if (!std::isfinite(value)) throw std::runtime_error("the device gives NaN or infinite values");
        for (const float value : one) if (!std::isfinite(value)) throw std::runtime_error("golden.safetensors holds NaN or infinite values");
        const std::vector<double> p = log_softmax(one), q = log_softmax(other);
        double kl = 0, dot = 0, mine = 0, theirs = 0;
        for (size_t i = 0; i < p.size(); i++) {
            kl += std::exp(p[i]) * (p[i] - q[i]);
            dot += double(one[i]) * other[i]; mine += double(one[i]) * one[i]; theirs += double(other[i]) * other[i];
            out.worst = std::max(out.worst, std::fabs(double(one[i]) - other[i]));
        }
        const size_t likeliest = size_t(std::max_element(one.begin(), one.end()) - one.begin());
        out.kl += std::max(0.0, kl) / double(expected.size());
        out.cosine += (1 - dot / std::max(std::sqrt(mine) * std::sqrt(theirs), 1e-30)) / double(expected.size());
        out.top1 += double(other[likeliest] == *std::max_element(other.begin(), other.end())) / double(expected.size());
    }
    return out;
}

// Gates, as JSON

struct Gate { std::string name, status, metric, reason; double value = NAN, limit = NAN; };

static Gate verdict(const std::string & name, const std::string & metric, double value, double limit, const std::string & reason) {
    return {name, value <= limit ? "passed" : "failed", metric, reason, value, limit};
}

static Gate attempt(const std::string & name, const std::function<Gate()> & run) {
    try { return run(); } catch (const std::exception & error) { return {name, "failed", "", error.what()}; }
}

static std::string figure(double value) {
    char text[40];
    std::snprintf(text, sizeof text, "%.17g", value);
    return std::isfinite(value) ? text : "null";
}

static std::string shown(double value) {
    char text[40];
    std::snprintf(text, sizeof text, "%.3g", value);
    return text;
}

// Words of a runtime as a report takes them: without a terminal's colours, and no book.
static std::string printable(const std::string & text) {
    std::string out;
    for (const unsigned char c : text.substr(0, 3000)) out += c < 0x20 || c >= 0x7f ? ' ' : char(c);
    return out;
}

static std::string json_of(const Gate & gate) {
    return "{\"name\": " + quoted(gate.name) + ", \"status\": " + quoted(gate.status) + ", \"metric\": " + quoted(gate.metric) + ", \"value\": " +
           figure(gate.value) + ", \"limit\": " + figure(gate.limit) + ", \"reason\": " + quoted(printable(gate.reason)) + "}";
}

// llama.cpp

static std::vector<std::string> last_words;

static void listen(ggml_log_level level, const char * text, void *) {
    if (level != GGML_LOG_LEVEL_WARN && level != GGML_LOG_LEVEL_ERROR && level != GGML_LOG_LEVEL_CONT) return;
    std::string line = text;
    while (!line.empty() && std::isspace((unsigned char) line.back())) line.pop_back();
    if (!line.empty()) last_words.push_back(line);
    if (last_words.size() > 5) last_words.erase(last_words.begin());
}

static std::string log_tail() {
    std::string out;
    for (const std::string & line : last_words) out += " | " + line;
    return out;
}

// Cores that this process may use: threads that share one wait for each other.
static int cores() {
#ifdef __linux__
    cpu_set_t set;
    if (!sched_getaffinity(0, sizeof set, &set)) return std::max(1, CPU_COUNT(&set));
#endif
    return int(std::max(1u, std::thread::hardware_concurrency()));
}

struct Model {
    llama_model * model = nullptr;
    llama_context * context = nullptr;
    llama_batch batch{};
    int length = 0, vocab = 0, width = 0, window = 0, past = 0, room = 0;
    bool encodes = false, pooled = false, normalize = false;

    Model(const fs::path & path, int tokens, ggml_type cache, bool encodes) : length(tokens), encodes(encodes) {
        llama_log_set(listen, nullptr);
        ggml_backend_load_all();
        llama_backend_init();
        llama_model_params wanted = llama_model_default_params();
        wanted.n_gpu_layers = 0;
        model = llama_model_load_from_file(path.string().c_str(), wanted);
        if (model && llama_model_n_embd(model) == 32) {
            // Rows of one block, of which llama.cpp's AMX kernels (0.3.36) compute nonsense: leave them as they are.
            llama_model_free(model);
            wanted.use_extra_bufts = false;
            model = llama_model_load_from_file(path.string().c_str(), wanted);
        }
        if (!model) throw std::runtime_error("llama.cpp refuses " + path.filename().string() + log_tail());
        room = encodes ? tokens : std::min(BATCH, tokens);
        llama_context_params given = llama_context_default_params();
        given.n_ctx = uint32_t(tokens);
        given.n_batch = given.n_ubatch = uint32_t(room);
        given.n_threads = given.n_threads_batch = cores();
        given.type_k = given.type_v = cache;
        given.embeddings = encodes;
        context = llama_init_from_model(model, given);
        if (!context) throw std::runtime_error("llama.cpp makes no context of " + std::to_string(tokens) + " tokens" + log_tail());
        vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
        width = llama_model_n_embd(model);
        window = llama_model_n_swa(model);
        pooled = llama_pooling_type(context) != LLAMA_POOLING_TYPE_NONE;
        char said[16] = "";
        llama_model_meta_val_str(model, "tapeout.normalize", said, sizeof said);
        normalize = std::string(said) == "true";
        batch = llama_batch_init(room, 0, 1);
    }
    Model(const Model &) = delete;
    ~Model() {
        if (context) { llama_batch_free(batch); llama_free(context); }
        if (model) llama_model_free(model);
    }
    void begin() {
        llama_memory_clear(llama_get_memory(context), true);
        past = 0;
    }
    void run(const llama_token * ids, int count, int outputs) {
        batch.n_tokens = count;
        for (int i = 0; i < count; i++) {
            batch.token[i] = ids[i]; batch.pos[i] = past + i; batch.logits[i] = i >= count - outputs;
            batch.n_seq_id[i] = 1; batch.seq_id[i][0] = 0;
        }
        const int status = encodes ? llama_encode(context, batch) : llama_decode(context, batch);
        if (status) throw std::runtime_error("llama.cpp gives " + std::to_string(status) + " for " + std::to_string(count) + " tokens at position " + std::to_string(past) + log_tail());
        past += encodes ? 0 : count;
    }
    // Append tokens; the logits after the last ``outputs`` of them.
    std::vector<Row> step(const llama_token * ids, int count, int outputs = 1) {
        run(ids, count, outputs);
        const float * logits = llama_get_logits(context);
        std::vector<Row> out;
        for (int i = 0; i < outputs; i++) out.emplace_back(logits + size_t(i) * size_t(vocab), logits + size_t(i + 1) * size_t(vocab));
        return out;
    }
    Row prefill(const Ids & ids, int chunk) {
        Row last;
        for (size_t at = 0; at < ids.size(); at += size_t(chunk)) last = step(&ids[at], int(std::min(size_t(chunk), ids.size() - at)))[0];
        return last;
    }
    Row decode(const llama_token * ids, size_t count) {
        Row last;
        for (size_t at = 0; at < count; at++) last = step(ids + at, 1)[0];
        return last;
    }
    Row encode(const Ids & ids) {
        run(ids.data(), int(ids.size()), int(ids.size()));
        const float * found = pooled ? llama_get_embeddings_seq(context, 0) : llama_get_embeddings(context);
        Row row(found, found + width);
        double squares = 0;
        for (const float value : row) squares += double(value) * value;
        if (pooled && normalize) for (float & value : row) value /= float(std::max(std::sqrt(squares), 1e-12));
        return row;
    }
};

static std::string percent(double share) {
    char text[16];
    std::snprintf(text, sizeof text, "%.1f%%", 100 * share);
    return text;
}

static Gate compare(const std::string & name, const std::vector<Prompt> & golden, double limit, const std::string & what, bool cosine,
                    const std::function<Row(const Ids &)> & run) {
    if (golden.empty()) return {name, "skipped", "", "the package has no golden.safetensors that can be used here."};
    std::vector<Row> expected, found;
    for (const Prompt & prompt : golden) { expected.push_back(prompt.row); found.push_back(run(prompt.ids)); }
    const Distance far = distance(expected, found);
    const std::string told = what + ", " + std::to_string(golden.size()) + " prompts of golden.safetensors: top-1 equal on " + percent(far.top1) +
                             ", largest difference " + shown(far.worst) + ".";
    return verdict(name, cosine ? "mean of 1 - cosine" : "mean KL, nats", cosine ? far.cosine : far.kl, limit, told);
}

static Gate prefill_decode(Model & model, const std::vector<Prompt> & golden, double limit) {
    const int reach = std::max(CHUNK, model.window + TAIL <= LONGEST ? model.window : 0);
    const int length = std::min({model.length, reach + TAIL, LONGEST}), tail = std::min(TAIL, length), cut = std::min(CHUNK, (length + 1) / 2);
    Ids text, ids;
    for (const Prompt & prompt : golden) text.insert(text.end(), prompt.ids.begin(), prompt.ids.end());
    if (text.empty()) for (int token = 0; token < 10; token++) text.push_back(token);
    for (int i = 0; i < length; i++) ids.push_back(text[size_t(i) % text.size()]);
    std::vector<Row> kept, other;
    model.begin();
    for (int at = 0; at < length; at += cut) {
        const int count = std::min(cut, length - at);
        for (Row & row : model.step(&ids[size_t(at)], count, count)) kept.push_back(std::move(row));
    }
    kept.erase(kept.begin(), kept.end() - tail);
    model.begin();
    for (int at = 0; at < length; at++) {
        Row row = model.step(&ids[size_t(at)], 1)[0];
        if (at >= length - tail) other.push_back(std::move(row));
    }
    const Distance far = distance(kept, other);
    const std::string past = model.window && length > model.window ? ", past the window of " + std::to_string(model.window) : "";
    const std::string told = "The last " + std::to_string(tail) + " of " + std::to_string(length) + " tokens, prefill in chunks of " + std::to_string(cut) +
        " against decode" + past + ": top-1 equal on " + percent(far.top1) + ", largest difference " + shown(far.worst) +
        ". Each may be off by the golden limit, and the variances of two roundings add up: twice that.";
    return verdict("prefill-decode", "mean KL, nats", far.kl, 2 * limit, told);
}

static std::vector<Gate> gates_of(Model & model, const std::vector<Prompt> & golden, double limit) {
    if (model.encodes)
        return {attempt("golden", [&] { return compare("golden", golden, limit, "encode", true, [&](const Ids & ids) { return model.encode(ids); }); })};
    std::vector<Prompt> longer;
    for (const Prompt & prompt : golden) if (prompt.ids.size() > 1) longer.push_back(prompt);
    auto by_prefill = [&](const Ids & ids) { model.begin(); return model.prefill(ids, std::min(CHUNK, int(ids.size() + 1) / 2)); };
    auto by_decode = [&](const Ids & ids) { model.begin(); return model.decode(ids.data(), ids.size()); };
    auto by_both = [&](const Ids & ids) {
        model.begin();
        const size_t half = ids.size() / 2;
        model.prefill(Ids(ids.begin(), ids.begin() + long(half)), CHUNK);
        return model.decode(ids.data() + half, ids.size() - half);
    };
    return {
        attempt("golden-prefill", [&] { return compare("golden-prefill", golden, limit, "prefill in chunks", false, by_prefill); }),
        attempt("golden-decode", [&] { return compare("golden-decode", golden, limit, "decode, token by token", false, by_decode); }),
        attempt("golden-handover", [&] { return compare("golden-handover", longer, limit, "prefill, then decode", false, by_both); }),
        attempt("prefill-decode", [&] { return prefill_decode(model, golden, limit); }),
    };
}

// Speed

static double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

static double quantile(std::vector<double> values, double share) {
    std::sort(values.begin(), values.end());
    const double place = share * double(values.size() - 1);
    const size_t low = size_t(place), high = std::min(low + 1, values.size() - 1);
    return values[low] + (place - double(low)) * (values[high] - values[low]);
}

static std::string times_of(const char * name, const std::vector<double> & seconds) {
    std::string out;
    for (const int q : {50, 90, 99}) out += "\"" + std::string(name) + "_p" + std::to_string(q) + "_s\": " + figure(quantile(seconds, q / 100.0)) + ", ";
    return out + "\"samples\": " + std::to_string(seconds.size());
}

// Prompt and tokens after it at 16, 128 and 512; one round more comes first and does not count.
static std::string decoder_speed(Model & model) {
    std::set<int> contexts;
    const int room = model.length - 1;
    for (const int n : {16, 128, 512}) contexts.insert(std::min(n, room - std::min(NEW_TOKENS, room / 2)));
    std::mt19937 random(0);
    std::string out, between;
    for (const int context : contexts) {
        const int fresh = std::min(NEW_TOKENS, model.length - context);
        Ids ids;
        for (int i = 0; i < context + fresh; i++) ids.push_back(llama_token(random() % unsigned(model.vocab)));
        std::vector<double> prompts, tokens;
        for (int round = 0; round <= REPEATS; round++) {
            model.begin();
            double begin = now();
            model.prefill(Ids(ids.begin(), ids.begin() + context), model.room);
            if (round) prompts.push_back(now() - begin);
            for (int i = context; i < context + fresh; i++) {
                begin = now();
                model.step(&ids[size_t(i)], 1);
                if (round) tokens.push_back(now() - begin);
            }
        }
        const double prefill = quantile(prompts, 0.5), token = quantile(tokens, 0.5);
        std::printf("%-12s context %6d: prefill %.1f tokens/s, decode %.1f tokens/s\n", "cpu", context, context / prefill, 1 / token);
        out += between + "{\"context\": " + std::to_string(context) + ", \"first_token_s\": " + figure(prefill + token) + ", \"prefill_tokens_per_s\": " +
               figure(context / prefill) + ", \"decode_tokens_per_s\": " + figure(1 / token) + ", " + times_of("token", tokens) + "}";
        between = ", ";
    }
    return "\"contexts\": [" + out + "]";
}

static std::string encoder_speed(Model & model) {
    std::string out, between;
    for (const int context : std::set<int>{std::min(16, model.length), std::min(128, model.length)}) {
        Ids ids;
        for (int i = 0; i < context; i++) ids.push_back(i % 10);
        std::vector<double> seconds;
        for (int run = 0; run <= RUNS; run++) {
            const double begin = now();
            model.encode(ids);
            if (run) seconds.push_back(now() - begin);
        }
        const double median = quantile(seconds, 0.5);
        std::printf("%-12s 1 x %d tokens: %.2f ms\n", "cpu", context, 1e3 * median);
        out += between + "{\"batch\": 1, \"context\": " + std::to_string(context) + ", \"sequences_per_s\": " + figure(1 / median) + ", \"tokens_per_s\": " +
               figure(context / median) + ", " + times_of("run", seconds) + "}";
        between = ", ";
    }
    return "\"encodings\": [" + out + "]";
}

static std::string peak_bytes() {
    rusage usage{};
    if (getrusage(RUSAGE_SELF, &usage)) return "null";
#ifdef __APPLE__
    return std::to_string(usage.ru_maxrss);
#else
    return std::to_string(1024LL * usage.ru_maxrss);
#endif
}

// The device, and the report

static std::string said_by(const char * path, const std::string & key = "") {
    std::ifstream file(path);
    for (std::string line; std::getline(file, line);) {
        if (line.rfind(key, 0) != 0) continue;
        std::string out;
        for (const char c : line.substr(key.size())) if ((unsigned char) c >= 0x20) out += c;
        const size_t first = out.find_first_not_of(" :=\""), last = out.find_last_not_of(" \"");
        return first == std::string::npos ? "" : out.substr(first, last - first + 1);
    }
    return "";
}

static std::string first_of(std::initializer_list<std::string> words) {
    for (const std::string & word : words) if (!word.empty()) return word;
    return "unknown";
}

static std::string device() {
#if defined(__aarch64__)
    const std::string kind = "aarch64";
#elif defined(__x86_64__)
    const std::string kind = "x86_64";
#else
    const std::string kind = "";
#endif
    const std::string machine = first_of({said_by("/proc/device-tree/model"), said_by("/sys/class/dmi/id/product_name"), kind});
    const std::string chip = first_of({said_by("/proc/cpuinfo", "model name"), said_by("/proc/cpuinfo", "Hardware"), machine});
    const long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGE_SIZE);
    return "{\"machine\": " + quoted(machine) + ", \"system\": " + quoted(first_of({said_by("/etc/os-release", "PRETTY_NAME=")})) + ", \"chip\": " +
           quoted(chip) + ", \"memory_bytes\": " + (pages > 0 ? std::to_string((long long) pages * page) : "null") + "}";
}

struct Unit { std::vector<Gate> gates; std::string throughput = "null"; };

static Unit run_on_cpu(const fs::path & root, const Json & manifest, std::string & runtime) {
    Unit unit;
    try {
        const Json & artifact = manifest.at("artifact"), & options = manifest.at("target").at("options");
        const std::map<std::string, ggml_type> caches = {{"kv-f16", GGML_TYPE_F16}, {"kv-int8", GGML_TYPE_Q8_0}, {"kv-int4", GGML_TYPE_Q4_0}};
        const ggml_type cache = caches.at(options.has("kv_cache") ? options.at("kv_cache").string() : "kv-f16");
        const bool encodes = manifest.at("model").has("output");
        const std::vector<Prompt> golden = golden_of(root);
        const double limit = limit_of(root), begin = now();
        Model model(root / "artifact" / artifact.at("files").items.at(0).string(), int(artifact.at("context").number()), cache, encodes);
        const double loaded = now();
        const Ids first = golden.empty() ? Ids{0} : Ids{golden[0].ids.at(0)};
        if (encodes) model.encode(first); else model.step(first.data(), 1);
        const double tried = now();
        runtime = std::string("llama.cpp, ") + llama_print_system_info();
        unit.gates.push_back(verdict("load", "functions that do not load", 0, 0, "loaded in " + shown(loaded - begin) + " s, the first call took " + shown(tried - loaded) + " s."));
        const std::vector<Gate> found = gates_of(model, golden, limit);
        unit.gates.insert(unit.gates.end(), found.begin(), found.end());
        std::string speed;
        try {
            speed = ", " + (encodes ? encoder_speed(model) : decoder_speed(model));
        } catch (const std::exception & error) { unit.gates.push_back({"speed", "failed", "", error.what()}); }
        unit.throughput = "{\"load_s\": " + figure(loaded - begin) + ", \"first_run_s\": " + figure(tried - loaded) + ", \"peak_resident_bytes\": " + peak_bytes() + speed + "}";
    } catch (const std::exception & error) {
        unit.gates.push_back({"load", "failed", "", std::string("it does not load and run: ") + error.what()});
    }
    return unit;
}

static int check(const fs::path & root, const fs::path & out) {
    const Json manifest = read_manifest(root);
    // Seen before minutes are spent on what it says.
    const fs::path partial = out.string() + "." + std::to_string(getpid());
    if (!std::ofstream(partial)) throw Stop(2, out.string() + " cannot be written: give another --out.");
    fs::remove(partial);
    const std::vector<std::string> wrong = damage(root, manifest);
    const std::string digest = manifest.at("root_sha256").text;
    const size_t count = manifest.at("files").fields.size() + manifest.at("beside").fields.size();
    std::string reason = std::to_string(count) + " files are as tapeout.json says, root digest " + digest, runtime = "none";
    if (!wrong.empty()) {
        reason = "the package is not what its manifest says: ";
        for (size_t i = 0; i < std::min<size_t>(5, wrong.size()); i++) reason += (i ? "; " : "") + wrong[i];
        reason += ". Nothing was run.";
    }
    std::cout << reason << std::endl;
    std::map<std::string, Unit> units;
    units["files"].gates.push_back(verdict("integrity", "files that differ", double(wrong.size()), 0, reason));
    if (wrong.empty()) units["cpu"] = run_on_cpu(root, manifest, runtime);
    std::string text, between;
    bool passed = true;
    for (const auto & [name, unit] : units) {
        std::string gates;
        for (const Gate & gate : unit.gates) {
            gates += (gates.empty() ? "\n    " : ",\n    ") + json_of(gate);
            passed = passed && gate.status != "failed";
            std::printf("%-12s %-16s %-8s %9s %9s  %s\n", name.c_str(), gate.name.c_str(), gate.status.c_str(), std::isnan(gate.value) ? "" : shown(gate.value).c_str(),
                        std::isnan(gate.limit) ? "" : shown(gate.limit).c_str(), (gate.status == "passed" ? gate.metric : gate.reason).c_str());
        }
        text += between + "\n  " + quoted(name) + ": {\n   \"gates\": [" + gates + "\n   ],\n   \"throughput\": " + unit.throughput + "\n  }";
        between = ",";
    }
    std::ofstream file(partial);
    file << "{\n \"format_version\": 1,\n \"root_sha256\": " << quoted(digest) << ",\n \"device\": " << device() << ",\n \"runtime\": " << quoted(runtime) << ",\n \"units\": {"
         << text << "\n }\n}\n";
    file.close();
    std::error_code none;
    if (file) fs::rename(partial, out, none);
    if (!file || none) {
        fs::remove(partial, none);
        throw Stop(2, out.string() + " cannot be written: give another --out.");
    }
    std::cout << (passed ? "passed: " : "FAILED: ") << out.string() << std::endl;
    return passed ? 0 : 1;
}

int main(int count, char ** words) {
    fs::path root = ".", out;
    int places = 0;
    try {
        for (int i = 1; i < count; i++) {
            const std::string word = words[i];
            if (word == "--out" && i + 1 < count) out = words[++i];
            else if (word.rfind("-", 0) == 0 || places++) throw Stop(2, "usage: check [PACKAGE] [--out FILE]");
            else root = word;
        }
        return check(root, out.empty() ? root / "device_report.json" : out);
    } catch (const Stop & stop) {
        std::cerr << "check: " << stop.what() << std::endl;
        return stop.status;
    } catch (const std::exception & error) {
        std::cerr << "check: " << error.what() << std::endl;
        return 2;
    }
}
