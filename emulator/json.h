// Writes JSON: objects and lists opened, filled and closed in order.
#pragma once

#include <cstdint>
#include <string>

namespace less::emulator {

class Json {
 public:
  void open(const char* name = nullptr) { begin(name, '{'); }
  void open_list(const char* name = nullptr) { begin(name, '['); }
  void close() { end('}'); }
  void close_list() { end(']'); }

  void number(const char* name, uint64_t value) {
    member(name);
    text_ += std::to_string(value);
  }

  void text(const char* name, const std::string& value) {
    member(name);
    quote(value);
  }

  const std::string& text() const { return text_; }

 private:
  void begin(const char* name, char bracket) {
    member(name);
    text_ += bracket;
    first_ = true;
  }

  void end(char bracket) {
    text_ += bracket;
    first_ = false;
  }

  void member(const char* name) {
    if (!first_) text_ += ',';
    first_ = false;
    if (name == nullptr) return;
    quote(name);
    text_ += ':';
  }

  void quote(const std::string& value) {
    text_ += '"';
    for (const char c : value) {
      if (c == '"' || c == '\\') text_ += '\\';
      text_ += static_cast<unsigned char>(c) < ' ' ? ' ' : c;
    }
    text_ += '"';
  }

  std::string text_;
  bool first_ = true;
};

}  // namespace less::emulator
