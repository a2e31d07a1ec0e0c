// Which instruction set the kernels use. All of them give the same bits; they differ in speed only.
#pragma once

namespace mixtral {

// Each includes those before it. Beyond AVX2 go the products of quantised rows, and what experts do between and after
// them (products.h); everything else takes AVX2's kernels with all of the last three.
enum class Isa : int { portable = 0, avx2 = 1, avx512vnni = 2, amx = 3 };

// The best one that this CPU has, that its operating system lets this process use, and that is trusted.
Isa best_isa();

// The one in use: the best one, or a lesser one that was asked for.
Isa active_isa();

}  // namespace mixtral
