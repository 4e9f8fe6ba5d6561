// From PTX text to decoded kernels: Reader splits the text, FunctionReader a kernel's body into statements, Decoder
// turns these into instructions.
#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <optional>
#include <set>
#include <stdexcept>

#include "program.h"

namespace emulator {
namespace {

struct PtxError {
  std::string message;
  uint32_t line;
};

// --- Text ---

bool is_word(char c) { return isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%' || c == '.'; }

class Reader {
 public:
  explicit Reader(std::string_view ptx) : text(ptx) {}
  uint32_t line = 1;

  [[noreturn]] void fail(const std::string& message) const { throw PtxError{message, line}; }

  char peek() {
    skip_space();
    return position < text.size() ? text[position] : 0;
  }
  bool at_end() { return peek() == 0; }
  bool accept(char c) {
    if (peek() != c) return false;
    ++position;
    return true;
  }
  void expect(char c) {
    if (!accept(c)) fail(std::string("'") + c + "' expected");
  }
  // Letters, digits, _ $ % . and, within a word, "::".
  std::string word() {
    skip_space();
    size_t end = position;
    while (end < text.size() &&
           (is_word(text[end]) ||
            (text[end] == ':' && end + 1 < text.size() && text[end + 1] == ':' && end > position) ||
            (text[end] == ':' && end > position && text[end - 1] == ':')))
      ++end;
    if (end == position) fail("unexpected character");
    const std::string result(text.substr(position, end - position));
    position = end;
    return result;
  }
  void skip_line() {
    while (position < text.size() && text[position] != '\n') ++position;
  }
  // Up to the brace that closes the one before.
  void skip_braces() {
    for (int depth = 1; depth;) {
      const char c = peek();
      if (!c) fail("'}' expected");
      ++position;
      depth += c == '{' ? 1 : c == '}' ? -1 : 0;
    }
  }
  std::string quoted() {
    expect('"');
    const size_t end = text.find('"', position);
    if (end == text.npos) fail("'\"' expected");
    const std::string result(text.substr(position, end - position));
    position = end + 1;
    return result;
  }
  uint64_t integer() {
    const bool negative = accept('-');
    const std::string digits = word();
    char* end;
    const uint64_t value = strtoull(digits.c_str(), &end, 0);
    if (*end && strcmp(end, "U") != 0) fail("'" + digits + "' is not a number");
    return negative ? 0 - value : value;
  }

 private:
  std::string_view text;
  size_t position = 0;

  void skip_space() {
    while (position < text.size()) {
      if (text[position] == '\n') {
        ++line;
        ++position;
      } else if (isspace(static_cast<unsigned char>(text[position]))) {
        ++position;
      } else if (text.substr(position, 2) == "//") {
        skip_line();
      } else if (text.substr(position, 2) == "/*") {
        size_t end = text.find("*/", position + 2);
        if (end == text.npos) fail("unfinished comment");
        for (; position < end + 2; ++position) line += text[position] == '\n';
      } else {
        break;
      }
    }
  }
};

std::vector<std::string> split(const std::string& name) {
  std::vector<std::string> parts;
  size_t start = 0;
  for (size_t dot; (dot = name.find('.', start)) != name.npos; start = dot + 1)
    parts.push_back(name.substr(start, dot - start));
  parts.push_back(name.substr(start));
  return parts;
}

// Bytes of a fundamental type; 0: a predicate; -1: not a type.
int type_bytes(std::string_view type) {
  if (type == "pred") return 0;
  for (const auto& [bytes, names] :
       {std::pair{1, "u8 s8 b8 "}, {2, "u16 s16 b16 f16 "}, {4, "u32 s32 b32 f32 "}, {8, "u64 s64 b64 f64 "}})
    if (strstr(names, (std::string(type) + " ").c_str()) == names ||
        strstr(names, (" " + std::string(type) + " ").c_str()))
      return bytes;
  return -1;
}

// --- Statements ---

enum class SymbolSpace { GLOBAL, SHARED, LOCAL, PARAMETER };

struct Symbol {
  SymbolSpace space;
  uint64_t address = 0;
  size_t bytes = 0;
  bool dynamic = false; /* extern .shared: behind all other shared variables */
};

struct Operand {
  enum Kind { REGISTER, IMMEDIATE, SINGLE, DOUBLE, SYMBOL, SPECIAL, ADDRESS, VECTOR, PAIR, LABEL, SINK } kind = SINK;
  bool negated = false;
  int index = -1;             /* REGISTER: in the function's list; SPECIAL: Constant::Kind */
  uint64_t value = 0;         /* IMMEDIATE, SINGLE and DOUBLE (bits); SYMBOL, ADDRESS: offset */
  std::string name;           /* SYMBOL, LABEL */
  std::vector<Operand> parts; /* ADDRESS: base; VECTOR; PAIR */
};

struct Statement {
  uint32_t line = 0;
  std::string label; /* a label alone */
  std::optional<Operand> guard;
  std::string name;
  std::vector<Operand> operands;
};

struct ModuleShared {
  size_t bytes, alignment;
  bool dynamic;
};

struct Function {
  std::vector<int> registers; /* bytes of each */
  std::map<std::string, Symbol> symbols;
  std::vector<Statement> statements;
  std::map<std::string, std::vector<std::string>> branch_targets;
};

const std::map<std::string, Constant::Kind>& special_registers() {
  static const std::map<std::string, Constant::Kind> names{{"%tid.x", Constant::TID_X},
                                                           {"%tid.y", Constant::TID_Y},
                                                           {"%tid.z", Constant::TID_Z},
                                                           {"%ntid.x", Constant::NTID_X},
                                                           {"%ntid.y", Constant::NTID_Y},
                                                           {"%ntid.z", Constant::NTID_Z},
                                                           {"%ctaid.x", Constant::CTAID_X},
                                                           {"%ctaid.y", Constant::CTAID_Y},
                                                           {"%ctaid.z", Constant::CTAID_Z},
                                                           {"%nctaid.x", Constant::NCTAID_X},
                                                           {"%nctaid.y", Constant::NCTAID_Y},
                                                           {"%nctaid.z", Constant::NCTAID_Z},
                                                           {"%laneid", Constant::LANEID},
                                                           {"%warpid", Constant::WARPID},
                                                           {"%nwarpid", Constant::NWARPID},
                                                           {"%lanemask_eq", Constant::LANEMASK_EQ},
                                                           {"%lanemask_le", Constant::LANEMASK_LE},
                                                           {"%lanemask_lt", Constant::LANEMASK_LT},
                                                           {"%lanemask_ge", Constant::LANEMASK_GE},
                                                           {"%lanemask_gt", Constant::LANEMASK_GT},
                                                           {"%dynamic_smem_size", Constant::DYNAMIC_SHARED_BYTES},
                                                           {"%total_smem_size", Constant::TOTAL_SHARED_BYTES}};
  return names;
}

// Between variables in shared memory, so that an access past the end of one is seen. A multiple of the banks' 128
// bytes.
constexpr uint32_t SHARED_GAP = 128;

uint32_t align_up(uint32_t value, uint32_t alignment) { return (value + alignment - 1) / alignment * alignment; }

class FunctionReader {
 public:
  FunctionReader(Reader& text, Kernel& entry, const Module& owner, const std::map<std::string, ModuleShared>& shared)
      : reader(text), kernel(entry), module(owner), module_shared(shared) {}

  Function read() {
    for (const PlacedVariable& variable : parameters)
      function.symbols[variable.name] = {SymbolSpace::PARAMETER, variable.offset, variable.bytes};
    read_scope();
    return std::move(function);
  }

  std::vector<PlacedVariable> parameters;

 private:
  struct Range {
    int first, count; /* count -1: one register of just this name */
  };
  Reader& reader;
  Kernel& kernel;
  const Module& module;
  const std::map<std::string, ModuleShared>& module_shared;
  Function function;
  std::vector<std::map<std::string, Range>> scopes;

  void read_scope() {
    scopes.emplace_back();
    while (!reader.accept('}')) {
      if (reader.accept('{')) {
        read_scope();
        continue;
      }
      Statement statement;
      if (reader.accept('@')) {
        const bool negated = reader.accept('!');
        statement.guard = read_operand();
        statement.guard->negated ^= negated;
      }
      reader.peek();
      statement.line = reader.line;
      statement.name = reader.word();
      if (statement.name[0] == '.') {
        read_directive(statement.name, "");
      } else if (reader.accept(':')) {
        statement.label = statement.name;
        function.statements.push_back(statement);
        if (reader.peek() == '.') read_directive(reader.word(), statement.label);
      } else {
        if (statement.name == "call" || statement.name.starts_with("call."))
          reader.fail("'call' is not supported: functions must be inlined");
        if (!reader.accept(';')) {
          do statement.operands.push_back(read_operand());
          while (reader.accept(','));
          reader.expect(';');
        }
        function.statements.push_back(statement);
      }
    }
    scopes.pop_back();
  }

  void read_directive(const std::string& directive, const std::string& label) {
    if (directive == ".loc" || directive == ".file") {
      reader.skip_line();
    } else if (directive == ".pragma") {
      reader.quoted();
      reader.expect(';');
    } else if (directive == ".branchtargets") {
      do function.branch_targets[label].push_back(reader.word());
      while (reader.accept(','));
      reader.expect(';');
    } else if (directive == ".reg") {
      read_registers();
    } else if (directive == ".shared" || directive == ".local") {
      read_variable(directive == ".shared");
    } else {
      reader.fail("'" + directive + "' within a function is not supported");
    }
  }

  void read_registers() {
    const std::string type = reader.word();
    const int bytes = type_bytes(type.substr(1));
    if (bytes < 0) reader.fail("registers of type '" + type + "' are not supported");
    do {
      const std::string name = reader.word();
      Range range{int(function.registers.size()), -1};
      if (reader.accept('<')) {
        range.count = int(reader.integer());
        reader.expect('>');
      }
      scopes.back()[name] = range;
      function.registers.insert(function.registers.end(), std::max(range.count, 1),
                                bytes == 0 ? 0 : std::max(bytes, 4));
    } while (reader.accept(','));
    reader.expect(';');
  }

  void read_variable(bool shared) {
    uint32_t alignment = 1, element = 1;
    std::string part = reader.word();
    for (; part[0] == '.'; part = reader.word()) {
      if (part == ".align")
        alignment = uint32_t(reader.integer());
      else if (type_bytes(part.substr(1)) > 0)
        element = uint32_t(type_bytes(part.substr(1)));
      else
        reader.fail("'" + part + "' of a variable is not supported");
    }
    uint32_t bytes = element;
    while (reader.accept('[')) {
      bytes *= uint32_t(reader.integer());
      reader.expect(']');
    }
    reader.expect(';');
    alignment = std::max(alignment, element);
    if (shared) {
      place_shared(part, bytes, alignment);
    } else {
      const uint32_t offset = align_up(kernel.local_bytes, alignment);
      kernel.local_bytes = align_up(offset + bytes, 16);
      kernel.local_variables.push_back({part, offset, bytes});
      function.symbols[part] = {SymbolSpace::LOCAL, offset, bytes};
    }
  }

  void place_shared(const std::string& name, uint32_t bytes, uint32_t alignment) {
    const uint32_t offset = align_up(kernel.shared_window_bytes, std::max(alignment, 16u));
    kernel.shared_window_bytes = align_up(offset + bytes, SHARED_GAP) + SHARED_GAP;
    kernel.shared_bytes = align_up(kernel.shared_bytes, alignment) + bytes;
    kernel.shared_variables.push_back({name, offset, bytes});
    function.symbols[name] = {SymbolSpace::SHARED, offset, bytes};
  }

  std::optional<int> find_register(const std::string& name) const {
    const size_t digits = name.find_last_not_of("0123456789") + 1;
    for (auto scope = scopes.rbegin(); scope != scopes.rend(); ++scope) {
      if (const auto found = scope->find(name); found != scope->end() && found->second.count < 0)
        return found->second.first;
      if (digits == name.size()) continue;
      const auto found = scope->find(name.substr(0, digits));
      if (found == scope->end() || found->second.count < 0) continue;
      const int index = atoi(name.c_str() + digits);
      if (index < found->second.count) return found->second.first + index;
    }
    return {};
  }

  Operand read_operand() {
    Operand operand;
    const char c = reader.peek();
    if (c == '!') {
      reader.expect('!');
      operand = read_operand();
      operand.negated = !operand.negated;
      return operand;
    }
    if (c == '{') {
      reader.expect('{');
      operand.kind = Operand::VECTOR;
      do operand.parts.push_back(read_operand());
      while (reader.accept(','));
      reader.expect('}');
      return operand;
    }
    if (c == '[') {
      reader.expect('[');
      operand.kind = Operand::ADDRESS;
      operand.parts.push_back(read_simple());
      read_offset(operand);
      reader.expect(']');
      return operand;
    }
    operand = read_simple();
    if (operand.kind == Operand::SYMBOL) read_offset(operand);
    if (reader.accept('|')) {
      Operand pair;
      pair.kind = Operand::PAIR;
      pair.parts = {operand, read_simple()};
      return pair;
    }
    return operand;
  }

  void read_offset(Operand& operand) {
    while (reader.peek() == '+' || reader.peek() == '-')
      operand.value += reader.accept('+') ? reader.integer() : reader.integer();
  }

  Operand read_simple() {
    Operand operand;
    const char c = reader.peek();
    if (isdigit(static_cast<unsigned char>(c)) || c == '-') {
      const bool negative = reader.accept('-');
      const std::string digits = reader.word();
      char* end = nullptr;
      if (digits.starts_with("0f") || digits.starts_with("0F")) {
        operand.kind = Operand::SINGLE;
        operand.value = strtoull(digits.c_str() + 2, &end, 16);
      } else if (digits.starts_with("0d") || digits.starts_with("0D")) {
        operand.kind = Operand::DOUBLE;
        operand.value = strtoull(digits.c_str() + 2, &end, 16);
      } else {
        operand.kind = Operand::IMMEDIATE;
        const bool binary = digits.starts_with("0b");
        operand.value = strtoull(digits.c_str() + (binary ? 2 : 0), &end, binary ? 2 : 0);
        if (*end == 'U') ++end;
        if (negative) operand.value = 0 - operand.value;
      }
      if (*end) reader.fail("'" + digits + "' is not a number");
      return operand;
    }
    const std::string name = reader.word();
    if (name == "_") return operand;
    if (const auto index = find_register(name)) {
      operand.kind = Operand::REGISTER;
      operand.index = *index;
      return operand;
    }
    if (const auto special = special_registers().find(name); special != special_registers().end()) {
      operand.kind = Operand::SPECIAL;
      operand.index = special->second;
      return operand;
    }
    if (name == "WARP_SZ") {
      operand.kind = Operand::IMMEDIATE;
      operand.value = LANES;
      return operand;
    }
    operand.name = name;
    if (!function.symbols.contains(name)) {
      if (const auto shared = module_shared.find(name); shared != module_shared.end()) {
        if (shared->second.dynamic)
          function.symbols[name] = {SymbolSpace::SHARED, 0, 0, true};
        else
          place_shared(name, uint32_t(shared->second.bytes), uint32_t(shared->second.alignment));
      } else if (const auto variable = module.variables.find(name); variable != module.variables.end()) {
        function.symbols[name] = {SymbolSpace::GLOBAL, variable->second.address, variable->second.bytes};
      } else if (name[0] == '%') {
        reader.fail("unknown register '" + name + "'");
      } else {
        operand.kind = Operand::LABEL;
        return operand;
      }
    }
    operand.kind = Operand::SYMBOL;
    return operand;
  }
};

// --- Instructions ---

// A register of the decoded kernel before it has a place.
struct Virtual {
  int bytes; /* 0: predicate */
  std::optional<Constant> constant;
  uint32_t offset = 0;
};

struct Emission {
  Handler run = nullptr;
  std::vector<int> operands; /* virtual registers << 1 | negated */
  int written = 0;           /* how many of them, from the first, are destinations */
  int64_t immediate = 0;
  std::string label;               /* branch */
  std::vector<std::string> labels; /* indexed branch */
  int skip_to = -1;                /* guard: index of the emission behind */
  int patterns = 0;
  uint32_t line = 0;
  Cost cost = PLAIN;
  bool counted = true;
  enum { FALLS_THROUGH, JUMPS, BRANCHES, INDEXED, LEAVES } flow = FALLS_THROUGH;
  int block = -1; /* block_start */
};

class Decoder {
 public:
  Decoder(Function& body, Kernel& entry) : function(body), kernel(entry), table(instruction_table()) {}

  void decode() {
    for (const int bytes : function.registers) virtuals.push_back({bytes, {}});
    find_copies();
    begin_block();
    for (const Statement& statement : function.statements) {
      line = statement.line;
      if (!statement.label.empty())
        add_label(statement.label);
      else
        decode_statement(statement);
    }
    if (block_open) emit_exit();
    finish_blocks();
    place_registers();
    link();
  }

 private:
  struct Block {
    int first, last; /* emissions */
    std::vector<int> successors;
    int post_dominator; /* -1: none but the exit */
  };
  Function& function;
  Kernel& kernel;
  const InstructionTable& table;
  std::vector<Virtual> virtuals;
  std::vector<const Operand*> copy_of; /* by register: it is only another name for this */
  std::map<std::tuple<int, int, int, bool, uint64_t>, int> constants;
  std::vector<Emission> code;
  std::vector<Block> blocks;
  std::map<std::string, int> label_blocks;
  bool block_open = false;
  uint32_t line = 0;
  int carry = -1; /* of add.cc and the like: a predicate */

  [[noreturn]] void fail(const std::string& message) const { throw PtxError{message, line}; }

  // --- Copies: registers that are written once, with what is known, need no instruction. ---

  static bool writes_first(const std::string& name) {
    for (const char* prefix :
         {"st.", "red.", "bra", "bar", "membar", "fence", "cp.", "prefetch", "nanosleep", "ret", "exit", "trap", "brx"})
      if (name.starts_with(prefix)) return false;
    return true;
  }

  static void for_each_register(const Operand& operand, const std::function<void(int)>& f) {
    if (operand.kind == Operand::REGISTER) f(operand.index);
    for (const Operand& part : operand.parts) for_each_register(part, f);
  }

  void find_copies() {
    std::vector<int> definitions(function.registers.size());
    for (const Statement& s : function.statements)
      if (s.label.empty() && !s.operands.empty() && writes_first(s.name))
        for_each_register(s.operands[0], [&](int index) { definitions[index] += s.guard ? 2 : 1; });
    copy_of.resize(function.registers.size());
    defined_by.resize(function.registers.size());
    for (const Statement& s : function.statements)
      if (s.operands.size() == 2 && s.operands[0].kind == Operand::REGISTER && writes_first(s.name))
        defined_by[s.operands[0].index] = &s;
    for (const Statement& s : function.statements) {
      if (s.operands.size() != 2 || s.operands[0].kind != Operand::REGISTER || definitions[s.operands[0].index] != 1)
        continue;
      const bool moves = s.name.starts_with("mov.") && s.name != "mov.pred";
      const bool converts = s.name == "cvta.to.global.u64" || s.name == "cvta.global.u64" ||
                            s.name == "cvta.to.const.u64" || s.name == "cvta.const.u64";
      const bool loads = s.name.starts_with("ld.param.") && s.operands[1].kind == Operand::ADDRESS;
      if (!moves && !converts && !loads) continue;
      const Operand& source = loads ? s.operands[1].parts[0] : s.operands[1];
      const int bytes = function.registers[s.operands[0].index];
      switch (source.kind) {
        case Operand::REGISTER:
          if (definitions[source.index] != 1 || (!loads && function.registers[source.index] != bytes)) continue;
          break;
        case Operand::IMMEDIATE:
        case Operand::SINGLE:
        case Operand::DOUBLE:
        case Operand::SYMBOL:
          break;
        case Operand::SPECIAL:
          if (bytes != 4) continue;
          break;
        default:
          continue;
      }
      if (loads && !is_known(source, definitions)) continue;
      if (loads) loaded_parameters[s.operands[0].index] = &s;
      copy_of[s.operands[0].index] = &source;
    }
  }

  std::vector<const Statement*> defined_by; /* by register: the last statement of two operands that writes it */
  std::map<int, const Statement*> loaded_parameters; /* by register: ld.param of a known address */

  // Is the operand an address that is the same for all threads? Follows moves, which may stand later in the text.
  bool is_known(const Operand& operand, const std::vector<int>& definitions) const {
    if (operand.kind == Operand::SYMBOL || operand.kind == Operand::IMMEDIATE) return true;
    if (operand.kind != Operand::REGISTER || definitions[operand.index] != 1) return false;
    const Statement* const s = defined_by[operand.index];
    return s && s->name.starts_with("mov.") && is_known(s->operands[1], definitions);
  }

  // --- Operands ---

  int constant(Constant c) {
    const auto [found, is_new] =
        constants.try_emplace({c.kind, c.bytes, c.loaded, c.is_signed, c.value}, int(virtuals.size()));
    if (is_new) virtuals.push_back({c.bytes, c});
    return found->second;
  }

  int immediate(uint64_t value, int bytes) {
    return constant({.kind = Constant::VALUE, .bytes = uint8_t(bytes), .value = bytes == 4 ? uint32_t(value) : value});
  }

  int temporary(int bytes) {
    virtuals.push_back({bytes, {}});
    return int(virtuals.size()) - 1;
  }

  uint64_t symbol_address(const Operand& operand) const {
    const Symbol& symbol = function.symbols.at(operand.name);
    return (symbol.dynamic ? kernel.shared_window_bytes : symbol.address) + operand.value;
  }

  int load_parameter(const Statement& s) {
    const auto parts = split(s.name);
    const std::string& type = parts.back();
    const int bytes = type_bytes(type), to = virtuals[s.operands[0].index].bytes;
    const int base = read(s.operands[1].parts[0], 8);
    const uint64_t address = virtuals[base].constant->value + s.operands[1].value;
    if (bytes <= 0) fail("unknown instruction '" + s.name + "'");
    if (address + bytes > kernel.parameter_bytes || address % bytes)
      throw PtxError{"'" + s.name + "' does not read a parameter", s.line};
    return constant({.kind = Constant::PARAMETER,
                     .bytes = uint8_t(to),
                     .loaded = uint8_t(bytes),
                     .is_signed = type[0] == 's',
                     .value = address});
  }

  // The virtual register that holds an operand; `bytes` is what the instruction reads (for immediates).
  int read(const Operand& operand, int bytes) {
    switch (operand.kind) {
      case Operand::REGISTER:
        if (const auto parameter = loaded_parameters.find(operand.index); parameter != loaded_parameters.end())
          return load_parameter(*parameter->second);
        if (copy_of[operand.index]) return read(*copy_of[operand.index], function.registers[operand.index]);
        return operand.index;
      case Operand::IMMEDIATE:
        if (bytes == 0) return constant({.kind = Constant::VALUE, .bytes = 0, .value = operand.value ? ALL_LANES : 0});
        return immediate(operand.value, bytes);
      case Operand::SINGLE:
        return immediate(
            bytes == 8 ? std::bit_cast<uint64_t>(double(std::bit_cast<float>(uint32_t(operand.value)))) : operand.value,
            bytes);
      case Operand::DOUBLE:
        return immediate(
            bytes == 4 ? std::bit_cast<uint32_t>(float(std::bit_cast<double>(operand.value))) : operand.value, bytes);
      case Operand::SYMBOL:
        return immediate(symbol_address(operand), bytes);
      case Operand::SPECIAL:
        return constant({.kind = Constant::Kind(operand.index)});
      default:
        fail("an operand is of a kind that the instruction does not take");
    }
  }

  int write(const Operand& operand, int bytes) {
    if (operand.kind == Operand::SINK) return temporary(bytes);
    if (operand.kind != Operand::REGISTER) fail("the destination is not a register");
    return operand.index;
  }

  // The register and the offset of [register+offset].
  std::pair<int, int64_t> address(const Operand& operand) {
    if (operand.kind != Operand::ADDRESS) fail("an address in brackets expected");
    int base = read(operand.parts[0], 8);
    int64_t offset = int64_t(operand.value);
    if (operand.parts[0].kind == Operand::SYMBOL) {
      base = immediate(symbol_address(operand.parts[0]) + operand.value, 8);
      offset = 0;
    }
    if (virtuals[base].bytes == 4) {
      const int wide = temporary(8);
      emit("widen", {wide, base}, 1).counted = false;
      base = wide;
    }
    return {base, offset};
  }

  // --- Emission ---

  Emission& emit(const std::string& name, const std::vector<int>& operands, int written) {
    const InstructionTable::Entry* const entry = table.find(name);
    if (!entry) fail("unknown instruction '" + current + "'");
    Emission e;
    e.run = entry->run;
    e.cost = entry->cost;
    e.line = line;
    e.written = written;
    for (const int operand : operands) e.operands.push_back(operand << 1);
    code.push_back(std::move(e));
    return code.back();
  }

  std::string current; /* the instruction's name as the text has it */

  void begin_block() {
    Emission e;
    e.run = table.find("block_start")->run;
    e.line = line;
    e.counted = false;
    e.block = int(blocks.size());
    blocks.push_back({int(code.size()), -1, {}, -1});
    code.push_back(e);
    block_open = true;
  }

  void end_block() {
    blocks.back().last = int(code.size()) - 1;
    block_open = false;
  }

  void add_label(const std::string& label) {
    if (block_open && code.back().block < 0) end_block();
    if (!block_open) begin_block();
    label_blocks[label] = int(blocks.size()) - 1;
  }

  void emit_exit() {
    emit("exit", {}, 0).flow = Emission::LEAVES;
    end_block();
  }

  // A statement that ends its block; with a guard it is jumped over.
  void decode_flow(const Statement& s, const std::vector<std::string>& parts) {
    const bool leaves = parts[0] == "ret" || parts[0] == "exit";
    const int condition = s.guard ? read(*s.guard, 0) : -1;
    if (leaves || parts[0] == "brx") {
      std::string behind;
      if (s.guard) {
        behind = "behind " + std::to_string(code.size());
        Emission& e = emit("bra.if", {condition}, 0);
        e.operands[0] |= !s.guard->negated;
        e.label = behind;
        e.flow = Emission::BRANCHES;
        e.counted = false;
        end_block();
        begin_block();
      }
      if (leaves) {
        emit_exit();
      } else {
        const auto targets = function.branch_targets.find(s.operands.at(1).name);
        if (targets == function.branch_targets.end())
          fail("'" + s.operands[1].name + "' is not a list of branch targets");
        Emission& e = emit("brx.idx", {read(s.operands[0], 4)}, 0);
        e.labels = targets->second;
        e.flow = Emission::INDEXED;
        end_block();
      }
      begin_block();
      if (s.guard) label_blocks[behind] = int(blocks.size()) - 1;
      return;
    }
    if (s.operands.size() != 1 || s.operands[0].kind != Operand::LABEL) fail("a label expected");
    Emission& e = s.guard ? emit("bra.if", {condition}, 0) : emit("bra", {}, 0);
    if (s.guard) e.operands[0] |= s.guard->negated;
    e.label = s.operands[0].name;
    e.flow = s.guard ? Emission::BRANCHES : Emission::JUMPS;
    end_block();
    begin_block();
  }

  void decode_statement(const Statement& s) {
    current = s.name;
    if (!block_open) begin_block();
    const std::vector<std::string> parts = split(s.name);
    if (parts[0] == "bra" || parts[0] == "brx" || parts[0] == "ret" || parts[0] == "exit") {
      decode_flow(s, parts);
      return;
    }
    if (s.operands.size() == 2 && s.operands[0].kind == Operand::REGISTER && copy_of[s.operands[0].index] &&
        writes_first(s.name)) {
      read(s.operands[0], function.registers[s.operands[0].index]); /* finds what is wrong with it */
      return;
    }
    const bool is_barrier = parts[0] == "barrier" || (parts[0] == "bar" && parts[1] != "warp");
    if (!s.guard) {
      decode_instruction(s, parts);
    } else if (is_barrier) {
      // As a branch around it, so that the warp's lanes are told apart.
      const std::string behind = "behind " + std::to_string(code.size());
      Emission& e = emit("bra.if", {read(*s.guard, 0)}, 0);
      e.operands[0] |= !s.guard->negated;
      e.label = behind;
      e.flow = Emission::BRANCHES;
      e.counted = false;
      end_block();
      begin_block();
      decode_instruction(s, parts);
      add_label(behind);
    } else {
      const int at = int(code.size());
      Emission& e = emit("guard", {read(*s.guard, 0)}, 0);
      e.operands[0] |= s.guard->negated;
      e.counted = false;
      decode_instruction(s, parts);
      emit("end_guard", {}, 0).counted = false;
      code[at].skip_to = int(code.size());
    }
  }

  void decode_instruction(const Statement& s, const std::vector<std::string>& parts) {
    const std::string& root = parts[0];
    if (root == "ld" || root == "ldu" || root == "st") return decode_access(s, parts);
    if (root == "atom" || root == "red") return decode_atomic(s, parts);
    if (root == "mov") return decode_move(s);
    if (root == "addc" || root == "subc" || ((root == "add" || root == "sub") && parts.size() > 1 && parts[1] == "cc"))
      return decode_carrying(s, parts);
    if (root == "cvta") return decode_cvta(s, parts);
    if (root == "setp") return decode_comparison(s, parts);
    if (root == "shfl") return decode_shuffle(s);
    if (root == "mma") return decode_mma(s);
    if (root == "cp") return decode_copy(s, parts);
    if (root == "prefetch" || root == "prefetchu") return;
    if (root == "barrier" || (root == "bar" && parts.at(1) != "warp")) return decode_barrier(s);
    decode_plain(s);
  }

  void decode_plain(const Statement& s) {
    const InstructionTable::Entry* entry = table.find(s.name);
    if (!entry) fail("unknown instruction '" + s.name + "'");
    const std::string& letters = entry->operands;
    if (letters.size() != s.operands.size())
      fail("'" + s.name + "' has " + std::to_string(letters.size()) + " operands, not " +
           std::to_string(s.operands.size()));
    const bool writes = writes_first(s.name);
    std::vector<int> operands;
    std::string actual;
    uint32_t negated = 0;
    for (size_t k = 0; k < letters.size(); ++k) {
      const int bytes = letters[k] == 'd' ? 8 : letters[k] == 'r' ? 4 : 0;
      const Operand& operand = s.operands[k];
      const int v = k == 0 && writes ? write(operand, bytes) : read(operand, bytes);
      operands.push_back(v);
      actual += virtuals[v].bytes == 8 ? 'd' : virtuals[v].bytes == 4 ? 'r' : 'p';
      if (operand.negated) {
        if (actual[k] != 'p') fail("'!' before an operand that is not a predicate");
        negated |= 1u << k;
      }
    }
    if (actual != letters) {
      if (!s.name.starts_with("cvt.")) fail("'" + s.name + "' has operands of sizes that it does not take");
      return decode_wide_conversion(s, operands, letters, actual);
    }
    Emission& e = emit(s.name, operands, writes ? 1 : 0);
    for (size_t k = 0; k < letters.size(); ++k) e.operands[k] |= negated >> k & 1;
  }

  // The registers of a conversion may be wider than its types.
  void decode_wide_conversion(const Statement& s, const std::vector<int>& operands, const std::string& letters,
                              const std::string& actual) {
    for (size_t k = 0; k < 2; ++k)
      if (actual[k] != letters[k] && actual[k] != 'd')
        fail("'" + s.name + "' has operands of sizes that it does not take");
    int from = operands[1], to = operands[0];
    if (actual[1] != letters[1]) {
      from = temporary(4);
      emit("low.b64", {from, operands[1]}, 1).counted = false;
    }
    if (actual[0] != letters[0]) to = temporary(4);
    emit(s.name, {to, from}, 1);
    if (to == operands[0]) return;
    const std::vector<std::string> parts = split(s.name);
    emit(parts[parts.size() - 2][0] == 's' ? "cvt.s64.s32" : "cvt.u64.u32", {operands[0], to}, 1).counted = false;
  }

  static bool is_hint(const std::string& part) {
    static const std::set<std::string> hints{"nc",   "ca",       "cg",      "cs",      "lu",      "cv",      "wb",
                                             "wt",   "volatile", "relaxed", "acquire", "release", "acq_rel", "weak",
                                             "mmio", "cta",      "gpu",     "sys",     "cluster"};
    return hints.contains(part) || part.starts_with("L1::") || part.starts_with("L2::");
  }

  static std::optional<std::string> space_of(const std::string& part) {
    const std::string name = part.substr(0, part.find("::"));
    for (const char* space : {"global", "shared", "local", "param"})
      if (name == space) return name;
    if (name == "const") return "global";
    return {};
  }

  void decode_access(const Statement& s, const std::vector<std::string>& parts) {
    const bool loads = parts[0] != "st";
    std::string space = "generic", type;
    size_t count = 1;
    for (size_t k = 1; k < parts.size(); ++k) {
      if (const auto found = space_of(parts[k]))
        space = *found;
      else if (parts[k] == "v2" || parts[k] == "v4")
        count = size_t(parts[k][1] - '0');
      else if (type_bytes(parts[k]) > 0)
        type = parts[k];
      else if (!is_hint(parts[k]))
        fail("unknown instruction '" + s.name + "'");
    }
    if (type.empty() || s.operands.size() != 2) fail("unknown instruction '" + s.name + "'");
    const int bytes = type_bytes(type);
    const Operand& where = s.operands[loads ? 1 : 0];
    const Operand& what = s.operands[loads ? 0 : 1];
    std::vector<const Operand*> values;
    if (what.kind == Operand::VECTOR)
      for (const Operand& part : what.parts) values.push_back(&part);
    else
      values.push_back(&what);
    if (values.size() != count) fail("'" + s.name + "' has " + std::to_string(values.size()) + " values");
    std::vector<int> operands;
    int width = 0;
    const auto [base, offset] = address(where);
    if (!loads) operands.push_back(base);
    for (const Operand* value : values) {
      const int v = loads ? write(*value, std::max(bytes, 4)) : read(*value, std::max(bytes, 4));
      operands.push_back(v);
      if (width && virtuals[v].bytes != width) fail("'" + s.name + "' has values of different sizes");
      width = virtuals[v].bytes;
    }
    if (loads) operands.push_back(base);
    const char sign = loads && type[0] == 's' && bytes < 8 ? 's' : 'u';
    const std::string name = std::string(loads ? "ld." : "st.") + space + "." + sign + std::to_string(bytes * 8) +
                             ".v" + std::to_string(count) + ":" + (width == 8 ? 'd' : 'r');
    Emission& e = emit(name, operands, loads ? int(count) : 0);
    e.immediate = offset;
    e.patterns = 1;
    if ((space == "shared" || space == "generic") && bytes * count < 4) kernel.small_shared_accesses = true;
  }

  void decode_atomic(const Statement& s, const std::vector<std::string>& parts) {
    const bool returns = parts[0] == "atom";
    std::string space = "generic", operation, type;
    for (size_t k = 1; k < parts.size(); ++k) {
      if (const auto found = space_of(parts[k]))
        space = *found;
      else if (type_bytes(parts[k]) > 0)
        type = parts[k];
      else if (!is_hint(parts[k]))
        operation = parts[k];
    }
    const size_t least = returns ? 3 : 2;
    if (s.operands.size() < least || type.empty()) fail("unknown instruction '" + s.name + "'");
    const int bytes = type_bytes(type);
    const auto [base, offset] = address(s.operands[returns ? 1 : 0]);
    const int d = returns ? write(s.operands[0], bytes) : temporary(bytes);
    const int b = read(s.operands[least - 1], bytes);
    const int c = s.operands.size() > least ? read(s.operands[least], bytes) : b;
    Emission& e = emit("atom." + space + "." + operation + "." + type, {d, base, b, c}, 1);
    e.immediate = offset;
    e.patterns = 1;
    if (space != "shared") kernel.serial = true;
  }

  // The carry is a register that the text does not name.
  void decode_carrying(const Statement& s, const std::vector<std::string>& parts) {
    const bool reads = parts[0].size() == 4, writes = parts.size() > 1 && parts[1] == "cc";
    const std::string& type = parts.back();
    const int bytes = type_bytes(type);
    if (parts.size() != (writes ? 3 : 2) || (type[0] != 'u' && type[0] != 's') || bytes < 4 || s.operands.size() != 3)
      fail("unknown instruction '" + s.name + "'");
    if (carry < 0) carry = temporary(0);
    const int none = constant({.kind = Constant::VALUE, .bytes = 0, .value = 0});
    emit(parts[0].substr(0, 3) + ".carrying." + std::to_string(bytes * 8),
         {write(s.operands[0], bytes), writes ? carry : temporary(0), read(s.operands[1], bytes),
          read(s.operands[2], bytes), reads ? carry : none},
         2);
  }

  void decode_move(const Statement& s) {
    if (s.operands.size() != 2) fail("'" + s.name + "' has two operands");
    const Operand &d = s.operands[0], &a = s.operands[1];
    const std::string type = s.name.substr(s.name.rfind('.') + 1);
    if (d.kind == Operand::VECTOR || a.kind == Operand::VECTOR) {
      if ((type != "b64" && type != "b32") || (d.kind == Operand::VECTOR ? d : a).parts.size() != 2)
        fail("unknown instruction '" + s.name + "' with this vector");
      const int whole = type == "b64" ? 8 : 4;
      if (a.kind == Operand::VECTOR) {
        emit("pack." + type, {write(d, whole), read(a.parts[0], 4), read(a.parts[1], 4)}, 1);
        return;
      }
      // The first half may overwrite the whole.
      int source = read(a, whole);
      const int low = write(d.parts[0], 4), high = write(d.parts[1], 4);
      if (low == source) {
        const int copy = temporary(whole);
        emit("mov." + type, {copy, source}, 1).counted = false;
        source = copy;
      }
      emit("low." + type, {low, source}, 1);
      emit("high." + type, {high, source}, 1);
      return;
    }
    decode_plain(s);
  }

  void decode_cvta(const Statement& s, const std::vector<std::string>& parts) {
    const bool to = parts.size() > 1 && parts[1] == "to";
    const auto space = parts.size() > (to ? 2 : 1) ? space_of(parts[to ? 2 : 1]) : std::nullopt;
    if (!space || parts.back() != "u64" || s.operands.size() != 2) fail("unknown instruction '" + s.name + "'");
    const uint64_t window = *space == "shared"  ? SHARED_WINDOW
                            : *space == "local" ? LOCAL_WINDOW
                            : *space == "param" ? PARAMETER_WINDOW
                                                : 0;
    emit("add.u64", {write(s.operands[0], 8), read(s.operands[1], 8), immediate(to ? 0 - window : window, 8)}, 1);
  }

  void decode_comparison(const Statement& s, const std::vector<std::string>& parts) {
    std::string name = parts.at(1), combination;
    bool flushes = false;
    for (size_t k = 2; k + 1 < parts.size(); ++k) {
      if (parts[k] == "ftz")
        flushes = true;
      else
        combination = parts[k];
    }
    name += "." + parts.back();
    const size_t count = combination.empty() ? 3 : 4;
    if (s.operands.size() != count ||
        (!combination.empty() && combination != "and" && combination != "or" && combination != "xor"))
      fail("unknown instruction '" + s.name + "'");
    const int bytes = std::max(type_bytes(parts.back()), 4);
    int a = read(s.operands[1], bytes), b = read(s.operands[2], bytes);
    if (flushes)
      for (int* operand : {&a, &b}) {
        const int flushed = temporary(4);
        emit("cvt.ftz.f32.f32", {flushed, *operand}, 1).counted = false;
        *operand = flushed;
      }
    const Operand& d = s.operands[0];
    if (combination.empty() && d.kind == Operand::REGISTER) {
      emit("setp." + name, {write(d, 0), a, b}, 1);
      return;
    }
    const bool pair = d.kind == Operand::PAIR;
    const int first = write(pair ? d.parts[0] : d, 0), second = pair ? write(d.parts[1], 0) : temporary(0);
    if (combination.empty()) {
      emit("setp." + name, {first, a, b}, 1);
      emit("not.pred", {second, first}, 1).counted = false;
      return;
    }
    // The comparison, then its result and its complement combined with the third predicate.
    const int result = temporary(0), third = read(s.operands[3], 0);
    emit("setp." + name, {result, a, b}, 1);
    for (const bool complement : {false, true}) {
      Emission& e = emit(combination + ".pred", {complement ? second : first, result, third}, 1);
      e.operands[1] |= complement;
      e.operands[2] |= s.operands[3].negated;
      e.counted = false;
      if (!pair) break;
    }
  }

  void decode_shuffle(const Statement& s) {
    if (s.operands.size() != 5) fail("'" + s.name + "' has five operands");
    const bool pair = s.operands[0].kind == Operand::PAIR;
    const int d = write(pair ? s.operands[0].parts[0] : s.operands[0], 4);
    const int inside = pair ? write(s.operands[0].parts[1], 0) : temporary(0);
    emit(s.name,
         {d, inside, read(s.operands[1], 4), read(s.operands[2], 4), read(s.operands[3], 4), read(s.operands[4], 4)},
         2);
  }

  void decode_barrier(const Statement& s) {
    for (const char* name : {"bar.sync", "bar.cta.sync", "barrier.sync", "barrier.cta.sync", "barrier.sync.aligned",
                             "barrier.cta.sync.aligned"})
      if (s.name == name && (s.operands.size() == 1 || s.operands.size() == 2)) {
        emit("bar.sync", {read(s.operands[0], 4), s.operands.size() == 2 ? read(s.operands[1], 4) : immediate(0, 4)},
             0);
        return;
      }
    fail("unknown instruction '" + s.name + "'");
  }

  void decode_mma(const Statement& s) {
    std::vector<int> operands;
    if (s.operands.size() != 4) fail("'" + s.name + "' has four operands");
    for (const Operand& operand : s.operands) {
      if (operand.kind != Operand::VECTOR) fail("'" + s.name + "' takes vectors");
      for (const Operand& part : operand.parts)
        operands.push_back(&operand == &s.operands[0] ? write(part, 4) : read(part, 4));
    }
    const size_t expected = s.name.find("m16n8k4") != s.name.npos ? 4 + 2 + 1 + 4 : 4 + 4 + 2 + 4;
    if (operands.size() != expected) fail("'" + s.name + "' has vectors of other lengths");
    emit(s.name, operands, 4);
  }

  void decode_copy(const Statement& s, const std::vector<std::string>& parts) {
    if (parts.size() < 3 || parts[1] != "async") fail("unknown instruction '" + s.name + "'");
    if (s.name == "cp.async.commit_group") {
      emit("cp.async.commit_group", {}, 0);
    } else if (s.name == "cp.async.wait_all") {
      emit("cp.async.wait", {}, 0).immediate = -1;
    } else if (s.name == "cp.async.wait_group" && s.operands.size() == 1) {
      emit("cp.async.wait", {}, 0).immediate = int64_t(s.operands[0].value);
    } else if ((parts[2] == "ca" || parts[2] == "cg") && (s.operands.size() == 3 || s.operands.size() == 4)) {
      const uint64_t bytes = s.operands[2].value;
      auto [target, target_offset] = address(s.operands[0]);
      const auto [source, offset] = address(s.operands[1]);
      if (target_offset) {
        const int sum = temporary(8);
        emit("add.u64", {sum, target, immediate(uint64_t(target_offset), 8)}, 1).counted = false;
        target = sum;
      }
      const int read_bytes = s.operands.size() == 4 ? read(s.operands[3], 4) : immediate(bytes, 4);
      if (virtuals[read_bytes].bytes != 4 || (parts[2] == "cg" && bytes != 16))
        fail("unknown instruction '" + s.name + "' with these operands");
      Emission& e = emit("cp.async." + std::to_string(bytes), {target, source, read_bytes}, 0);
      e.immediate = offset;
      e.patterns = 2;
    } else {
      fail("unknown instruction '" + s.name + "'");
    }
  }

  // --- Blocks ---

  void finish_blocks() {
    for (size_t b = 0; b < blocks.size(); ++b) {
      const Emission& last = code[blocks[b].last];
      const auto target = [&](const std::string& label) {
        const auto found = label_blocks.find(label);
        if (found == label_blocks.end()) throw PtxError{"there is no label '" + label + "'", last.line};
        blocks[b].successors.push_back(found->second);
      };
      if (last.flow == Emission::JUMPS || last.flow == Emission::BRANCHES) target(last.label);
      for (const std::string& label : last.labels) target(label);
      if (last.flow == Emission::FALLS_THROUGH || last.flow == Emission::BRANCHES)
        blocks[b].successors.push_back(int(b) + 1);
    }
    find_post_dominators();
    for (const Block& block : blocks) {
      BlockCost cost;
      for (int k = block.first; k <= block.last; ++k) {
        cost.instructions += code[k].counted;
        cost.float_operations += code[k].cost == MULTIPLY_ADD ? 2 : code[k].cost == FLOAT ? 1 : 0;
        cost.mma += code[k].cost == MMA;
      }
      kernel.blocks.push_back(cost);
    }
  }

  // Immediate post-dominators (Cooper, Harvey, Kennedy 2001, on the reversed graph). Block n is the exit.
  void find_post_dominators() {
    const int n = int(blocks.size());
    std::vector<std::vector<int>> predecessors(n + 1);
    for (int b = 0; b < n; ++b) {
      for (const int s : blocks[b].successors) predecessors[s].push_back(b);
      if (code[blocks[b].last].flow == Emission::LEAVES) predecessors[n].push_back(b);
    }
    std::vector<int> order, number(n + 1, -1);
    std::vector<std::pair<int, size_t>> stack{{n, 0}};
    std::vector<bool> seen(n + 1);
    seen[n] = true;
    while (!stack.empty()) {
      auto& [block, next] = stack.back();
      if (next < predecessors[block].size()) {
        const int p = predecessors[block][next++];
        if (!seen[p]) {
          seen[p] = true;
          stack.push_back({p, 0});
        }
      } else {
        number[block] = int(order.size());
        order.push_back(block);
        stack.pop_back();
      }
    }
    std::vector<int> dominator(n + 1, -1);
    dominator[n] = n;
    for (bool changed = true; changed;) {
      changed = false;
      for (size_t k = order.size() - 1; k-- > 0;) {
        const int b = order[k];
        std::vector<int> successors = blocks[b].successors;
        if (code[blocks[b].last].flow == Emission::LEAVES) successors.push_back(n);
        int common = -1;
        for (int s : successors) {
          if (dominator[s] < 0) continue;
          if (common < 0) {
            common = s;
            continue;
          }
          for (int other = s; common != other;)
            if (number[common] < number[other])
              common = dominator[common];
            else
              other = dominator[other];
        }
        if (common != dominator[b]) {
          dominator[b] = common;
          changed = true;
        }
      }
    }
    for (int b = 0; b < n; ++b) blocks[b].post_dominator = dominator[b] == n ? -1 : dominator[b];
  }

  // --- Registers ---

  // From where to where in the text a register is in use. Positions are twice the emission's index, and one more for
  // what an emission writes.
  struct Range {
    int first = INT32_MAX, last = -1;
    void include(int position) {
      first = std::min(first, position);
      last = std::max(last, position);
    }
  };

  std::vector<Range> live_ranges() const {
    const size_t words = (virtuals.size() + 63) / 64;
    using Set = std::vector<uint64_t>;
    std::vector<Set> used(blocks.size(), Set(words)), written(blocks.size(), Set(words)),
        live_in(blocks.size(), Set(words));
    std::vector<Range> ranges(virtuals.size());
    const auto has = [](const Set& set, int v) { return set[size_t(v) / 64] >> v % 64 & 1; };
    const auto insert = [](Set& set, int v) { set[size_t(v) / 64] |= uint64_t(1) << v % 64; };
    for (size_t b = 0; b < blocks.size(); ++b) {
      int guarded_until = -1; /* what is written under a guard may also keep its value */
      for (int k = blocks[b].first; k <= blocks[b].last; ++k) {
        const Emission& e = code[k];
        guarded_until = std::max(guarded_until, e.skip_to);
        for (size_t o = 0; o < e.operands.size(); ++o) {
          const int v = e.operands[o] >> 1;
          const bool writes = int(o) < e.written;
          ranges[v].include(2 * k + writes);
          if ((!writes || k < guarded_until) && !has(written[b], v)) insert(used[b], v);
        }
        for (int o = 0; o < e.written; ++o)
          if (k >= guarded_until) insert(written[b], e.operands[o] >> 1);
      }
    }
    std::vector<Set> live_out(blocks.size(), Set(words));
    for (bool changed = true; changed;) {
      changed = false;
      for (size_t b = blocks.size(); b-- > 0;)
        for (size_t word = 0; word < words; ++word) {
          for (const int s : blocks[b].successors) live_out[b][word] |= live_in[s][word];
          const uint64_t in = used[b][word] | (live_out[b][word] & ~written[b][word]);
          changed |= in != live_in[b][word];
          live_in[b][word] = in;
        }
    }
    for (size_t b = 0; b < blocks.size(); ++b)
      for (size_t v = 0; v < virtuals.size(); ++v) {
        if (has(live_in[b], int(v))) ranges[v].include(2 * blocks[b].first);
        if (has(live_out[b], int(v))) ranges[v].include(2 * blocks[b].last + 1);
      }
    return ranges;
  }

  // Registers whose ranges do not meet share a place, so that a warp's registers stay in the host's cache. Constants
  // keep theirs: they are filled only once.
  void place_registers() {
    const std::vector<Range> ranges = live_ranges();
    std::vector<int> order;
    for (size_t v = 0; v < virtuals.size(); ++v)
      if (!virtuals[v].constant && ranges[v].last >= 0) order.push_back(int(v));
    std::sort(order.begin(), order.end(), [&](int a, int b) { return ranges[a].first < ranges[b].first; });
    uint32_t next = 0;
    for (const int bytes : {0, 4, 8}) {
      const uint32_t size = bytes ? uint32_t(bytes) * LANES : 4, start = next;
      std::multimap<int, uint32_t> busy; /* last position: place */
      std::vector<uint32_t> free;
      for (const int v : order) {
        if (virtuals[v].bytes != bytes) continue;
        while (!busy.empty() && busy.begin()->first < ranges[v].first) {
          free.push_back(busy.begin()->second);
          busy.erase(busy.begin());
        }
        if (free.empty()) {
          free.push_back(next);
          next += size;
        }
        virtuals[v].offset = free.back();
        free.pop_back();
        busy.insert({ranges[v].last, virtuals[v].offset});
      }
      if (bytes) kernel.register_count += int((next - start) / (4 * LANES));
      for (Virtual& v : virtuals)
        if (v.constant && v.bytes == bytes) {
          v.offset = next;
          next += size;
        }
      next = align_up(next, 64);
    }
    kernel.register_bytes = next;
    for (const Virtual& v : virtuals) {
      if (!v.constant) continue;
      Constant c = *v.constant;
      c.offset = v.offset;
      kernel.constants.push_back(c);
    }
  }

  // --- Instructions with their operands and targets ---

  void link() {
    kernel.code.resize(code.size() + 1);
    Instruction* const start = kernel.code.data();
    const auto block_at = [&](int block) { return start + blocks[block].first; };
    int block = 0;
    for (size_t k = 0; k < code.size(); ++k) {
      const Emission& e = code[k];
      Instruction& i = start[k];
      if (e.block >= 0) block = e.block;
      i.run = e.run;
      i.immediate = e.block >= 0 ? e.block : e.immediate;
      i.target = nullptr;
      i.line = e.line;
      i.pattern = kernel.patterns;
      kernel.patterns += uint32_t(e.patterns);
      if (e.operands.size() > MAX_OPERANDS) {
        auto& list = kernel.operand_lists.emplace_back(new uint32_t[e.operands.size()]);
        for (size_t o = 0; o < e.operands.size(); ++o) list[o] = virtuals[e.operands[o] >> 1].offset;
        i.operands = list.get();
      } else {
        for (size_t o = 0; o < e.operands.size(); ++o)
          i.operand[o] = virtuals[e.operands[o] >> 1].offset | (e.operands[o] & 1 ? NEGATED : 0);
      }
      const int join = blocks[block].post_dominator;
      if (e.flow == Emission::BRANCHES || e.flow == Emission::INDEXED)
        i.immediate = join < 0 ? 0 : reinterpret_cast<int64_t>(block_at(join));
      if (e.flow == Emission::JUMPS || e.flow == Emission::BRANCHES) i.target = block_at(label_blocks.at(e.label));
      if (e.flow == Emission::INDEXED) {
        auto& list = kernel.target_lists.emplace_back(new const Instruction*[e.labels.size()]);
        for (size_t t = 0; t < e.labels.size(); ++t) list[t] = block_at(label_blocks.at(e.labels[t]));
        i.targets = list.get();
        i.pattern = uint32_t(e.labels.size());
      }
      if (e.skip_to >= 0) i.target = start + e.skip_to;
    }
  }
};

// --- Modules ---

class ModuleReader {
 public:
  ModuleReader(std::string_view ptx, Module& owner, Memory& device) : reader(ptx), module(owner), memory(device) {}

  void read() {
    while (!reader.at_end()) {
      const std::string word = reader.word();
      if (word == ".version") {
        const auto parts = split(reader.word());
        module.ptx_version = atoi(parts[0].c_str()) * 10 + (parts.size() > 1 ? atoi(parts[1].c_str()) : 0);
      } else if (word == ".target") {
        module.target = reader.word();
        while (reader.accept(',')) reader.word();
      } else if (word == ".address_size") {
        if (reader.integer() != 64) reader.fail("addresses must have 64 bits");
      } else if (word == ".visible" || word == ".weak" || word == ".common") {
      } else if (word == ".extern") {
        is_extern = true;
        continue;
      } else if (word == ".entry") {
        read_entry();
      } else if (word == ".func") {
        skip_function();
      } else if (word == ".global" || word == ".const" || word == ".shared") {
        read_variable(word == ".shared");
      } else if (word == ".file") {
        reader.skip_line();
      } else if (word == ".section") {
        reader.word();
        reader.expect('{');
        reader.skip_braces();
      } else {
        reader.fail("unknown directive '" + word + "'");
      }
      is_extern = false;
    }
  }

  uint32_t line() const { return reader.line; }

 private:
  Reader reader;
  Module& module;
  Memory& memory;
  std::map<std::string, ModuleShared> shared;
  bool is_extern = false;

  void read_entry() {
    auto kernel = std::make_unique<Kernel>();
    static std::atomic<uint64_t> kernels = 0;
    kernel->name = reader.word();
    kernel->number = ++kernels;
    std::vector<PlacedVariable> parameters;
    if (reader.accept('(') && !reader.accept(')')) {
      do parameters.push_back(read_parameter(*kernel));
      while (reader.accept(','));
      reader.expect(')');
    }
    while (!reader.accept('{')) {
      const std::string directive = reader.word();
      if (directive == ".maxntid" || directive == ".reqntid") {
        kernel->max_threads = 1;
        do kernel->max_threads *= int(reader.integer());
        while (reader.accept(','));
      } else if (directive == ".minnctapersm" || directive == ".maxnreg" || directive == ".maxnctapersm") {
        reader.integer();
      } else {
        reader.fail("'" + directive + "' of a kernel is not supported");
      }
    }
    FunctionReader body(reader, *kernel, module, shared);
    body.parameters = parameters;
    Function function = body.read();
    Decoder(function, *kernel).decode();
    module.kernels.push_back(std::move(kernel));
  }

  PlacedVariable read_parameter(Kernel& kernel) {
    uint32_t alignment = 1, element = 1;
    std::string part = reader.word();
    if (part != ".param") reader.fail("'.param' expected");
    for (part = reader.word(); part[0] == '.'; part = reader.word()) {
      if (part == ".align")
        alignment = std::max(alignment, uint32_t(reader.integer()));
      else if (type_bytes(part.substr(1)) > 0)
        element = uint32_t(type_bytes(part.substr(1)));
      else if (part == ".ptr") { /* what it points to, and how it is aligned */
        std::string attribute = ".ptr";
        while (reader.peek() == '.') {
          attribute = reader.word();
          if (attribute == ".align") reader.integer();
        }
      } else
        reader.fail("'" + part + "' of a parameter is not supported");
    }
    uint32_t bytes = element;
    if (reader.accept('[')) {
      bytes *= uint32_t(reader.integer());
      reader.expect(']');
    }
    const uint32_t offset = align_up(uint32_t(kernel.parameter_bytes), std::max(alignment, element));
    kernel.parameter_offsets.push_back(offset);
    kernel.parameter_sizes.push_back(bytes);
    kernel.parameter_bytes = offset + bytes;
    return {part, offset, bytes};
  }

  // Device functions have been inlined where they are used.
  void skip_function() {
    while (reader.peek() && reader.peek() != '{' && reader.peek() != ';') {
      if (!reader.accept('(') && !reader.accept(')') && !reader.accept(',') && !reader.accept('[') &&
          !reader.accept(']'))
        reader.word();
    }
    if (reader.accept('{'))
      reader.skip_braces();
    else
      reader.expect(';');
  }

  void read_variable(bool is_shared) {
    size_t alignment = 1, element = 1;
    bool is_float = false;
    std::string part = reader.word();
    for (; part[0] == '.'; part = reader.word()) {
      if (part == ".align")
        alignment = reader.integer();
      else if (type_bytes(part.substr(1)) > 0) {
        element = size_t(type_bytes(part.substr(1)));
        is_float = part[1] == 'f';
      } else if (part != ".attribute")
        reader.fail("'" + part + "' of a variable is not supported");
    }
    size_t count = 1;
    bool open = false;
    while (reader.accept('[')) {
      if (reader.peek() == ']')
        open = true;
      else
        count *= reader.integer();
      reader.expect(']');
    }
    const size_t bytes = open ? 0 : count * element;
    if (is_shared) {
      reader.expect(';');
      shared[part] = {bytes, std::max(alignment, element), is_extern || open};
      return;
    }
    if (is_extern) reader.fail("the variable '" + part + "' is not defined in this module");
    std::vector<uint8_t> content(bytes); /* what is not initialised is zero */
    if (reader.accept('=')) {
      size_t at = 0;
      const auto read_value = [&] {
        const bool negative = reader.accept('-');
        const std::string text = reader.word();
        uint64_t value = 0;
        char* end = nullptr;
        if (is_float && !text.starts_with("0f") && !text.starts_with("0d") && !text.starts_with("0F") &&
            !text.starts_with("0D"))
          reader.fail("floating-point initialisers must be hexadecimal");
        const bool hexadecimal = is_float || text.starts_with("0f") || text.starts_with("0F");
        value = strtoull(text.c_str() + (hexadecimal ? 2 : 0), &end, hexadecimal ? 16 : 0);
        if (*end && *end != 'U') reader.fail("the initialiser '" + text + "' is not supported");
        if (negative) value = 0 - value;
        if (at + element > bytes) reader.fail("more initialisers than elements");
        memcpy(content.data() + at, &value, element);
        at += element;
      };
      const std::function<void()> read_values = [&] {
        if (!reader.accept('{')) return read_value();
        do read_values();
        while (reader.accept(','));
        reader.expect('}');
      };
      read_values();
    }
    reader.expect(';');
    const uint64_t address = memory.allocate(bytes);
    if (!address) reader.fail("out of memory for the variable '" + part + "'");
    memcpy(reinterpret_cast<void*>(address), content.data(), bytes);
    memory.mark_written(address, bytes);
    module.variables[part] = {address, bytes};
  }
};

}  // namespace

Module::Module(Memory& device_memory) : memory(device_memory) {}

Module::~Module() {
  for (const auto& [name, variable] : variables) memory.free(variable.address);
}

Kernel* Module::kernel(std::string_view name) const {
  for (const auto& kernel : kernels)
    if (kernel->name == name) return kernel.get();
  return nullptr;
}

std::unique_ptr<Module> Module::parse(std::string_view ptx, Memory& memory, std::string& error) {
  auto module = std::make_unique<Module>(memory);
  ModuleReader reader(ptx, *module, memory);
  try {
    reader.read();
    return module;
  } catch (const PtxError& e) {
    error = e.message + ", line " + std::to_string(e.line) + " of the PTX";
  }
  return nullptr;
}

}  // namespace emulator
