// Pages that begin, before a call uses them.
#pragma once

#include "ops/library.h"

namespace less::ops {

inline void reset_fresh([[maybe_unused]] const Arguments& arguments, const Layout& layout,
                        const Pool& pool, int64_t B) {
  if (pool.fresh == nullptr || pool.N == 0) return;
#ifdef LESS_LAUNCHES
  const ResetParams params{.layout = layout, .pool = pool, .B = B};
  // Of this launch alone: it may touch the pool and nothing of the op's own.
  const Arguments own{arguments.op, arguments.first_name, arguments.first};
  own.note_memory("pool", pool.data, size_t((pool.N - 1) * pool.stride + layout.nbytes), false);
  own.note_memory("rows", const_cast<int32_t*>(pool.pages), size_t(2 * B) * sizeof(int32_t), false);
  launch(own, cuda::reset_pages, params, {});
#else
  for (int64_t b = 0; b < B; ++b) {
    unsigned char* const own = page(pool, b);
    if (own != nullptr && pool.fresh[b] != 0) clear_page(layout, own);
  }
#endif
}

}  // namespace less::ops
