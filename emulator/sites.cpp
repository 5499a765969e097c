#include "emulator/sites.h"

#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <unordered_map>
#include <vector>

#include "emulator/state.h"

namespace less::emulator {
namespace {

struct Site {
  const void* pc;  // null: the name is known from the start
  std::string name;
};

// The place is looked up at every access, so the lines found last are kept in a table by hash.
constexpr size_t kRecent = 4096;
struct Recent {
  uintptr_t key;
  uint32_t line;
  uint32_t site;
};
Recent recent[kRecent];

std::vector<Site>& sites() {
  static std::vector<Site> all(1, {nullptr, "?"});
  return all;
}

Recent& recent_of(uintptr_t key, uint32_t line) {
  return recent[(key ^ (key >> 12) ^ (line * 31u)) % kRecent];
}

uint32_t add_site(const void* pc, std::string name) {
  sites().push_back({pc, std::move(name)});
  return uint32_t(sites().size() - 1);
}

// Runs addr2line once for all instructions of one file: pcs are offsets into it.
void resolve(const std::string& file, const std::vector<std::pair<uint32_t, uintptr_t>>& pcs) {
  constexpr size_t kAtOnce = 500;
  for (size_t first = 0; first < pcs.size(); first += kAtOnce) {
    const size_t last = std::min(pcs.size(), first + kAtOnce);
    std::string command = "addr2line -e '" + file + "'";
    char text[4096];
    for (size_t i = first; i < last; ++i) {
      std::snprintf(text, sizeof text, " 0x%zx", size_t(pcs[i].second));
      command += text;
    }
    FILE* const answer = popen((command + " 2>/dev/null").c_str(), "r");
    for (size_t i = first; i < last; ++i) {
      Site& site = sites()[pcs[i].first];
      if (answer == nullptr || std::fgets(text, sizeof text, answer) == nullptr || *text == '?') {
        std::snprintf(text, sizeof text, "%s+0x%zx", short_name(file.c_str()),
                      size_t(pcs[i].second));
      }
      text[std::strcspn(text, " \n")] = 0;
      site.name = short_name(text);
    }
    if (answer != nullptr) pclose(answer);
  }
}

}  // namespace

uint32_t site_of(Where at) {
  static std::map<std::pair<std::string, int>, uint32_t> by_line;
  const uintptr_t key = reinterpret_cast<uintptr_t>(at.file);
  Recent& entry = recent_of(key, uint32_t(at.line));
  if (entry.key == key && entry.line == uint32_t(at.line)) return entry.site;
  const std::string file = short_name(at.file);
  const auto [found, fresh] = by_line.try_emplace({file, at.line}, 0);
  if (fresh) found->second = add_site(nullptr, file + ":" + std::to_string(at.line));
  entry = {key, uint32_t(at.line), found->second};
  return entry.site;
}

uint32_t site_of(const void* pc) {
  static std::unordered_map<const void*, uint32_t> by_pc;
  const uintptr_t key = reinterpret_cast<uintptr_t>(pc);
  Recent& entry = recent_of(key, 0);
  if (entry.key == key && entry.line == 0) return entry.site;
  const auto [found, fresh] = by_pc.try_emplace(pc, 0);
  if (fresh) found->second = add_site(pc, "");
  entry = {key, 0, found->second};
  return entry.site;
}

size_t site_count() { return sites().size(); }

void resolve_sites() {
  std::map<std::string, std::vector<std::pair<uint32_t, uintptr_t>>> by_file;
  for (uint32_t i = 1; i < sites().size(); ++i) {
    const Site& site = sites()[i];
    Dl_info info;
    if (!site.name.empty() || !dladdr(site.pc, &info)) continue;
    // A return address: the call before it is the access.
    const uintptr_t offset = reinterpret_cast<uintptr_t>(site.pc) - 1;
    by_file[info.dli_fname].emplace_back(i, offset - reinterpret_cast<uintptr_t>(info.dli_fbase));
  }
  for (const auto& [file, pcs] : by_file) resolve(file, pcs);
}

std::string where(uint32_t site) {
  if (sites()[site].name.empty()) resolve_sites();
  return sites()[site].name;
}

std::string symbol_at(const void* function) {
  Dl_info info;
  if (!dladdr(function, &info)) return "";
  std::ifstream file(info.dli_fname, std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  if (bytes.size() < sizeof(Elf64_Ehdr)) return "";
  const auto at = [&](auto type, uint64_t offset) {
    return reinterpret_cast<const decltype(type)*>(bytes.data() + offset);
  };
  const auto* const header = at(Elf64_Ehdr(), 0);
  const auto* const sections = at(Elf64_Shdr(), header->e_shoff);
  const uint64_t address =
      reinterpret_cast<uintptr_t>(function) -
      (header->e_type == ET_DYN ? reinterpret_cast<uintptr_t>(info.dli_fbase) : 0);
  for (int i = 0; i < header->e_shnum; ++i) {
    const Elf64_Shdr& table = sections[i];
    if (table.sh_type != SHT_SYMTAB && table.sh_type != SHT_DYNSYM) continue;
    const auto* const symbols = at(Elf64_Sym(), table.sh_offset);
    const char* const names = bytes.data() + sections[table.sh_link].sh_offset;
    for (uint64_t k = 0; k < table.sh_size / sizeof(Elf64_Sym); ++k) {
      const Elf64_Sym& symbol = symbols[k];
      if (ELF64_ST_TYPE(symbol.st_info) == STT_FUNC && symbol.st_value == address) {
        return names + symbol.st_name;
      }
    }
  }
  return "";
}

bool in_loaded_module(const void* p) {
  struct Query {
    uintptr_t address;
    uintptr_t low, high;  // of the segment that holds it
  };
  static Query last{0, 0, 0};
  const auto address = reinterpret_cast<uintptr_t>(p);
  if (address - last.low < last.high - last.low) return true;
  Query query{address, 0, 0};
  const int found = dl_iterate_phdr(
      [](dl_phdr_info* module, size_t, void* data) {
        Query& q = *static_cast<Query*>(data);
        for (int i = 0; i < module->dlpi_phnum; ++i) {
          const ElfW(Phdr) & segment = module->dlpi_phdr[i];
          const uintptr_t low = module->dlpi_addr + segment.p_vaddr;
          if (segment.p_type != PT_LOAD || q.address - low >= segment.p_memsz) continue;
          q.low = low;
          q.high = low + segment.p_memsz;
          return 1;
        }
        return 0;
      },
      &query);
  if (found) last = query;
  return found != 0;
}

}  // namespace less::emulator
