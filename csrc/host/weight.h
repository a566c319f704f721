// A frozen weight: dense, or in NF4, which a launch decodes right before it is used (lora_kernels/nf4.py).

#pragma once

#include <array>
#include <string_view>

#include "node.h"

namespace lora_kernels::host {

struct Weight {
  // packed, absmax, nested_absmax, nested_map and offset, the last three undefined without double quantization.
  using Parts = std::array<Tensor, 5>;

  Tensor dense;
  Parts parts;
  int64_t rows = 0, columns = 0, block_size = 0;

  bool is_nf4() const { return block_size != 0; }

  // Whether the launches take it on a device, in the dtype of a product if it is dense.
  bool fits(c10::Device device, at::ScalarType dtype) const {
    if (!is_nf4()) {
      return is_plain(dense, device) && dense.scalar_type() == dtype && dense.dim() == 2 && dense.size(0) == rows &&
             dense.size(1) == columns && (dense.stride(0) == 1 || dense.stride(1) == 1);
    }
    const Tensor& packed = parts[0];
    // FSDP frees what it can gather again: Python says so.
    if (!packed.defined() || packed.storage().nbytes() < packed.nbytes()) return false;
    const bool nested = parts[2].defined();
    for (size_t i = 0; i < parts.size(); ++i) {
      if (!parts[i].defined()) {
        if (i < 2 || nested) return false;
        continue;
      }
      const at::ScalarType type = i == 0 || (i == 1 && nested) ? at::kByte : at::kFloat;
      if (!is_plain(parts[i], device) || parts[i].scalar_type() != type || !parts[i].is_contiguous()) return false;
    }
    // Codes are read by words of eight.
    return packed.numel() == (rows * columns + 1) / 2 && packed.numel() % 4 == 0 && misaligned(packed) == 0;
  }

  void describe(Key& key) const {
    key.add(block_size << 8 | static_cast<int64_t>(parts[2].defined()) << 7 | misaligned(dense) |
            misaligned(parts[1]) << 1 | misaligned(parts[2]) << 2 | misaligned(parts[3]) << 3 |
            misaligned(parts[4]) << 4);
    if (!is_nf4()) key.add_strides(dense);
  }

  // Of a group's weights, which all have one layout.
  bool is_by_rows() const { return is_nf4() || dense.stride(1) == 1; }
};

// The launches of a plan, one after the other.
class Launching {
 public:
  Launching(const Launches& launches, void* stream) : stream(stream), next_(launches.begin()), end_(launches.end()) {}
  Launch& next() { return **next_++; }
  // Whether the next one, but for masks, decodes a weight inside of a product.
  bool decodes() const { return upcoming() == "nf4_product" || streams(); }
  // Whether that is the CUDA backend's.
  bool streams() const { return upcoming() == "nf4_stream"; }
  // Whether the next one, but for masks, is a backward with all its gradients.
  bool is_whole() const { return upcoming() == "backward"; }
  // Whether the next one is of layers whose rank is large.
  bool is_wide() const { return upcoming() == "products"; }
  // Whether the next one gives the adapters' gradients, of a layer or of a group: otherwise the libraries do.
  bool is_of_adapters() const {
    const std::string_view name = upcoming();
    return name == "adapter_grads" || name == "group_grads";
  }
  void* const stream;

 private:
  std::string_view upcoming() const {
    auto launch = next_;
    while (launch != end_ && (*launch)->name == "mask") ++launch;
    return launch == end_ ? std::string_view() : (*launch)->name;
  }

  Launches::const_iterator next_, end_;
};

// The weight as a matrix: decoded, if it must be, in memory of its own.
inline Tensor dense_of(const Weight& weight, Launching& launching, const Tensor& like, at::ScalarType dtype) {
  if (!weight.is_nf4()) return weight.dense;
  const Tensor out = fresh({weight.rows, weight.columns}, like, dtype);
  std::array<const void*, 6> tensors{};
  for (size_t i = 0; i < weight.parts.size(); ++i) tensors[i] = address(weight.parts[i]);
  tensors[5] = address(out);
  launching.next()(tensors.data(), nullptr, launching.stream);
  return out;
}

// For Python: a tensor, a tuple of an NF4 weight's parts, or None.
inline pybind11::object wrapped(const Weight& weight) {
  if (!weight.is_nf4()) return wrapped(weight.dense);
  pybind11::list parts;
  for (const Tensor& part : weight.parts) {
    if (part.defined()) parts.append(wrapped(part));
  }
  return pybind11::tuple(parts);
}

}  // namespace lora_kernels::host
