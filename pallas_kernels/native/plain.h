// What plain.cc and ffi.cc share: how packed weights say what they are of.
#pragma once

#include "core.h"

namespace clicktrain {

struct PackedHead {
  char magic[8];
  char instructions[16];
  int64_t content_bytes;
  int32_t type, cin, cout, kh, kw, filters, channels, unused;
};
static_assert(sizeof(PackedHead) == 64, "what follows stays aligned to 64 bytes");

// What `pack` of core.h wrote, behind the head; null where the head is of other weights or another instruction set.
const void* packed_content(Type type, const Mask& mask, const Geometry& window, const void* packed, int64_t bytes);

}  // namespace clicktrain
