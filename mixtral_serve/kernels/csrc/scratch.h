// Memory that the caller of the library brought, handed out piece by piece.
#pragma once

#include <cstdint>

namespace mixtral {

// In steps of whole cache lines. From no memory, the addresses say how much is needed.
class Scratch {
 public:
  explicit Scratch(void* memory) : next_(static_cast<char*>(memory)) {}

  template <typename T>
  T* take(int64_t count) {
    char* taken = next_;
    next_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return reinterpret_cast<T*>(taken);
  }

 private:
  char* next_;
};

}  // namespace mixtral
