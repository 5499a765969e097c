// Pages that begin, before a call uses them.
#pragma once

#include "ops/library.h"

namespace less::ops {

inline void reset_fresh([[maybe_unused]] const Arguments& arguments, const Layout& layout,
                        const Pool& pool, int64_t B) {
  if (pool.fresh == nullptr) return;
#ifdef LESS_LAUNCHES
  const ResetParams params{.layout = layout, .pool = pool, .B = B};
  launch(arguments, cuda::reset_pages, params, {});
#else
  for (int64_t b = 0; b < B; ++b) {
    unsigned char* const own = page(pool, b);
    if (own != nullptr && pool.fresh[b] != 0) clear_page(layout, own);
  }
#endif
}

}  // namespace less::ops
