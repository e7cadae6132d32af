// Which instruction sets this processor can run, out of those that kernels were compiled for.
#pragma once

#include <string>
#include <vector>

namespace vitrail {

enum class Isa { kPortable, kNeon, kAvx2, kAvx512 };

// The sets that run here, slowest first. Portable is always the first of them.
const std::vector<Isa>& supported_isas();

const char* isa_name(Isa isa);

// The set of that name, or the fastest one for an empty name. Throws std::invalid_argument where it
// cannot run here.
Isa isa_from_name(const std::string& name);

}  // namespace vitrail
