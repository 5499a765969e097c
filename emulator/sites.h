// Places in the source: what an instruction's address, or a helper's caller, is called in reports.
#pragma once

#include <cstdint>
#include <string>

#include "emulator/runtime.h"

namespace less::emulator {

// Small numbers that stand for places; 0 is none.
uint32_t site_of(Where at);
uint32_t site_of(const void* pc);
size_t site_count();
// "decode_step.cu:71".
std::string where(uint32_t site);
// Asks for the names of many instructions at once.
void resolve_sites();

// Mangled name of the function that begins there, hidden ones too; empty if not known.
std::string symbol_at(const void* function);
// Whether the address lies in a loaded program or library: constants and tables.
bool in_loaded_module(const void* p);

}  // namespace less::emulator
