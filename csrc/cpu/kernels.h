// Every CPU kernel, by name; dispatch.h tells how a line here becomes less::cpu::<op>.
#pragma once

#include "cpu/dispatch.h"
#include "cpu/simd_test.h"
#include "params.h"

LESS_CPU_KERNEL(fold, FoldParams)
LESS_CPU_KERNEL(simd_test, SimdTestParams)
