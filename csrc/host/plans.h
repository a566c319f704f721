// What calls are remembered by: everything of their arguments that a check or a choice depends on.

#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>

namespace lora_kernels::host {

class Key {
 public:
  void add(int64_t word) {
    words_[size_++] = word;
    hash_ = (hash_ ^ static_cast<uint64_t>(word)) * 0x9E3779B97F4A7C15u;
    hash_ ^= hash_ >> 29;
  }
  void add(double number) {
    int64_t word = 0;
    std::memcpy(&word, &number, sizeof(word));
    add(word);
  }
  void add_strides(const at::Tensor& matrix) {
    add(matrix.stride(0));
    add(matrix.stride(1));
  }
  bool operator==(const Key& other) const {
    return size_ == other.size_ && std::memcmp(words_.data(), other.words_.data(), size_ * sizeof(int64_t)) == 0;
  }
  size_t hash() const { return hash_; }

 private:
  std::array<int64_t, 48> words_;
  uint64_t hash_ = 0;
  size_t size_ = 0;
};

struct HashOfKey {
  size_t operator()(const Key& key) const { return key.hash(); }
};

template <typename Plan>
class Plans {
 public:
  std::shared_ptr<const Plan> find(const Key& key) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = plans_.find(key);
    return found == plans_.end() ? nullptr : found->second;
  }
  // What is forgotten is destroyed behind the lock: it may wait for the interpreter, which may wait for the lock.
  void remember(const Key& key, std::shared_ptr<const Plan> plan) {
    Map forgotten;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (plans_.size() >= kMost) forgotten.swap(plans_);
    plans_[key].swap(plan);
  }
  void clear() {
    Map forgotten;
    const std::lock_guard<std::mutex> lock(mutex_);
    forgotten.swap(plans_);
  }

 private:
  static constexpr size_t kMost = 8192;
  using Map = std::unordered_map<Key, std::shared_ptr<const Plan>, HashOfKey>;
  std::mutex mutex_;
  Map plans_;
};

// Triton compiles other loads for tensors that do not start on 16 bytes.
inline int64_t misaligned(const at::Tensor& tensor) {
  return tensor.defined() && reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 != 0;
}

// An ordinary tensor on the device: no subclass, no view that is conjugated or negated later, no transform of functorch.
inline bool is_plain(const at::Tensor& tensor, c10::Device device) {
  using c10::DispatchKey;
  static const uint64_t known =
      c10::DispatchKeySet({DispatchKey::CPU, DispatchKey::CUDA, DispatchKey::AutogradCPU, DispatchKey::AutogradCUDA,
                           DispatchKey::ADInplaceOrView, DispatchKey::AutocastCPU, DispatchKey::AutocastCUDA})
          .raw_repr();
  return (tensor.key_set().raw_repr() & ~known) == 0 && tensor.device() == device &&
         !tensor._fw_grad(/*level=*/0).defined();
}

// Whether PyTorch does what it is told, and no mode, tracer or transform has to be told of it.
inline bool dispatch_is_plain() {
  using c10::DispatchKey;
  static const uint64_t usual = c10::DispatchKeySet({DispatchKey::BackendSelect, DispatchKey::ADInplaceOrView}).raw_repr();
  return (c10::impl::tls_local_dispatch_key_set().included_.raw_repr() & ~usual) == 0;
}

// The stride between the rows of a tensor [..., columns] as a matrix of `rows` rows; none if it is no such matrix, or one
// whose rows are not contiguous.
inline std::optional<int64_t> row_stride(const at::Tensor& tensor, int64_t rows, int64_t columns) {
  const int64_t last = tensor.dim() - 1;
  if (columns > 1 && tensor.stride(last) != 1) return std::nullopt;
  if (last == 1) {
    if (tensor.stride(0) < columns && rows > 1) return std::nullopt;
    return tensor.stride(0);
  }
  if (tensor.is_contiguous()) return columns;
  std::optional<int64_t> stride;
  int64_t expected = 0;
  for (int64_t dim = last - 1; dim >= 0; --dim) {
    if (tensor.size(dim) == 1) continue;
    if (!stride) stride = expected = tensor.stride(dim);
    if (tensor.stride(dim) != expected) return std::nullopt;
    expected *= tensor.size(dim);
  }
  // Less is an expanded tensor.
  if (!stride || *stride < columns) return std::nullopt;
  return stride;
}

}  // namespace lora_kernels::host
