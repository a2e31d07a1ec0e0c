// Which instruction set the kernels use. All of them give the same bits; they differ in speed only.
#pragma once

namespace mixtral {

// Each includes those before it. What goes beyond AVX2 are the products of quantised rows; whatever else is computed
// in floating point takes AVX2's kernels with all of the last three.
enum class Isa : int { portable = 0, avx2 = 1, avx512vnni = 2, amx = 3 };

// The best one that this CPU has, that its operating system lets this process use, and that is trusted.
Isa best_isa();

// The one in use: the best one, or a lesser one that was asked for.
Isa active_isa();

}  // namespace mixtral
