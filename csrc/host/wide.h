// Layers of a large rank, by the two launches of lora_kernels/backends/triton/wide_ranks.py: S of each of them, and then
// what their products add up to.

#pragma once

#include "call.h"

namespace lora_kernels::host {

// out = left W + S U + bias and S = scale * left D.
struct WideLayer {
  Tensor left, weight, down, up, bias, s;
  double scale = 1.0;
};

using WideLayers = std::array<WideLayer, kMostLayers>;

// The arguments of products.py's kernel up to its integers.
class Products {
 public:
  void add_output(const Tensor& out, const Tensor& bias, double scale) {
    tensors_[outputs_] = address(out);
    tensors_[kMostLayers + 2 * kMostPairs + outputs_] = address(bias);
    scales_[outputs_++] = static_cast<float>(scale);
  }
  void add_pair(const Tensor& left, const Tensor& right) {
    const void** const pair = &tensors_[kMostLayers + 2 * pairs_++];
    pair[0] = address(left), pair[1] = address(right);
  }
  void launch(Launching& launching) const { launching.next()(tensors_.data(), scales_.data(), launching.stream); }

 private:
  static constexpr size_t kMostPairs = 2 * kMostLayers;
  // Outputs, pairs, biases, and no scale on the device.
  std::array<const void*, kMostLayers + 2 * kMostPairs + 2 * kMostLayers> tensors_{};
  std::array<float, kMostLayers> scales_{};
  size_t outputs_ = 0, pairs_ = 0;
};

// S of each layer. Float32 adapters are rounded before they are used.
inline void launch_narrow(Launching& launching, WideLayers& layers, size_t count) {
  Products products;
  for (size_t i = 0; i < count; ++i) {
    WideLayer& layer = layers[i];
    layer.down = layer.down.to(layer.left.scalar_type()), layer.up = layer.up.to(layer.left.scalar_type());
    products.add_output(layer.s, Tensor(), layer.scale);
    products.add_pair(layer.left, layer.down);
  }
  products.launch(launching);
}

// Each layer's out.
inline void launch_each(Launching& launching, WideLayers layers, size_t count,
                        const std::array<Tensor, kMostLayers>& outs) {
  launch_narrow(launching, layers, count);
  Products products;
  for (size_t i = 0; i < count; ++i) {
    const WideLayer& layer = layers[i];
    products.add_output(outs[i], layer.bias, 1.0);
    products.add_pair(layer.left, layer.weight);
    products.add_pair(layer.s, layer.up);
  }
  products.launch(launching);
}

// The sum of all layers' out, which have no biases.
inline void launch_summed(Launching& launching, WideLayers layers, size_t count, const Tensor& out) {
  launch_narrow(launching, layers, count);
  Products products;
  products.add_output(out, Tensor(), 1.0);
  for (size_t i = 0; i < count; ++i) products.add_pair(layers[i].left, layers[i].weight);
  for (size_t i = 0; i < count; ++i) products.add_pair(layers[i].s, layers[i].up);
  products.launch(launching);
}

}  // namespace lora_kernels::host
