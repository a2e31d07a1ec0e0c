#include "products.h"

#include "cpu.h"

namespace mixtral {

const Kernels& active_kernels() {
#if defined(__x86_64__)
  switch (active_isa()) {
    case Isa::amx:
      return amx_kernels();
    case Isa::avx512vnni:
      return avx512_kernels();
    case Isa::avx2:
      return avx2_kernels();
    case Isa::portable:
      break;
  }
#endif
  return portable_kernels();
}

}  // namespace mixtral
