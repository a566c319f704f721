// csrc/ptx.cuh for a CPU: which lane has which number is written out, as the PTX manual draws it.
#pragma once

#include <utility>

#include "numbers.cuh"

namespace lora_kernels {

alignas(16) inline unsigned char dynamic_memory[1 << 17];

inline unsigned char* dynamic_shared() { return dynamic_memory; }

// Before it lies what has a size that the compiler knows.
constexpr uint32_t kDynamicAddress = 2048;
inline uint32_t shared_address(const void* pointer) {
  return kDynamicAddress + static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - dynamic_memory);
}

inline void copy_async(void* target, const void* source, bool inside) {
  emulation::require(emulation::on_16_bytes(target) && emulation::on_16_bytes(source));
  if (inside) {
    std::memcpy(target, source, 16);
  } else {
    std::memset(target, 0, 16);
  }
}

inline void commit_copies() {}

template <int kLeft>
inline void wait_copies() {}

// Here one launch comes after the other.
inline void wait_for_launch_before() {}
inline void let_next_launch_begin() {}

inline void load_matrices(uint32_t (&r)[4], const void* row, bool transposed) {
  emulation::require(emulation::on_16_bytes(row));
  const int warp = emulation::warp(), lane = emulation::lane();
  emulation::shown[warp][lane] = reinterpret_cast<uintptr_t>(row);
  emulation::meet_warp();
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t pair[2];
    for (int e = 0; e < 2; ++e) {
      int i = lane / 4, j = lane % 4 * 2 + e;
      if (transposed) std::swap(i, j);
      pair[e] = reinterpret_cast<const uint16_t*>(emulation::shown[warp][matrix * 8 + i])[j];
    }
    std::memcpy(&r[matrix], pair, 4);
  }
  emulation::meet_warp();
}

inline void load_matrices(uint32_t (&r)[4], const void* row) { load_matrices(r, row, false); }
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) { load_matrices(r, row, true); }

template <class T>
inline void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b, T) {
  struct Fragments {
    T a[4][2], b[2][2];
  };
  Fragments mine;
  std::memcpy(mine.a, a, sizeof(mine.a));
  std::memcpy(mine.b, b, sizeof(mine.b));
  const int warp = emulation::warp(), lane = emulation::lane();
  emulation::shown[warp][lane] = reinterpret_cast<uintptr_t>(&mine);
  emulation::meet_warp();
  const auto of = [&](int other) -> const Fragments& {
    return *reinterpret_cast<const Fragments*>(emulation::shown[warp][other]);
  };
  for (int e = 0; e < 4; ++e) {
    const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
    double sum = c[e];
    for (int k = 0; k < 16; ++k) {
      const T left = of(row % 8 * 4 + k % 8 / 2).a[row / 8 + k / 8 * 2][k % 2];
      const T right = of(column * 4 + k % 8 / 2).b[k / 8][k % 2];
      sum += static_cast<double>(to_float(left)) * to_float(right);
    }
    c[e] = static_cast<float>(sum);
  }
  emulation::meet_warp();
}

}  // namespace lora_kernels
