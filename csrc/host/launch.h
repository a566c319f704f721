// A launch of a compiled kernel whose grid and numbers are settled: what changes is where the tensors lie, and floats.
// Messages are one string: TORCH_CHECK's stream crashes where a compiler links a libstdc++ of its own beside PyTorch's.

#pragma once

#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace lora_kernels::host {

// What this file asks of the CUDA driver, by address: nothing here is compiled or linked against CUDA.
struct Driver {
  int (*launch)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                unsigned block_z, unsigned shared, void* stream, void** parameters, void** extra);
  int (*encode_map)(void* map, int type, unsigned rank, void* address, const uint64_t* sizes,
                    const uint64_t* row_bytes, const uint32_t* box, const uint32_t* steps, int interleave,
                    int swizzle, int l2_promotion, int fill);
  int (*is_capturing)(void* stream, int* status);
  int (*set_context)(void* context);
  // PyTorch's: the stream that is current on a device in this thread.
  int (*current_stream)(int32_t device, void** stream);
};

inline Driver driver{};

// All of a tensor map but the address, in the order of direct.py's MapShape.
struct MapShape {
  int argument, type;
  uint64_t rows, columns, row_bytes;
  uint32_t box_rows, box_columns;
  int swizzle;
};

class Launch {
 public:
  using Parameters = std::vector<std::pair<std::string, int>>;

  // `parameters` are those of the kernel in order, by direct.py's kinds; `numbers` the integers, by argument.
  Launch(uint64_t function, uint64_t context, std::array<unsigned, 3> grid, unsigned threads, unsigned shared,
         const Parameters& parameters, const std::map<int, int64_t>& numbers, std::vector<MapShape> maps,
         int64_t workspace_size, int64_t counters, std::string name)
      : workspace_size(workspace_size),
        counters(counters),
        name(std::move(name)),
        function_(reinterpret_cast<void*>(function)),
        context_(reinterpret_cast<void*>(context)),
        grid_(grid),
        threads_(threads),
        shared_(shared),
        shapes_(std::move(maps)),
        encoded_(shapes_.size()) {
    // Two more for the scratch pointers that Triton appends, both null.
    TORCH_CHECK(parameters.size() + 2 <= kMostParameters && shapes_.size() <= kMostMaps,
                "a kernel has " + std::to_string(parameters.size()) + " parameters, more than fit");
    fixed_.fill(&zeros_);
    numbers_.reserve(numbers.size());
    for (size_t position = 0; position < parameters.size(); ++position) {
      const auto& [kind, argument] = parameters[position];
      if (kind == "Q") {
        tensors_.emplace_back(position, argument);
      } else if (kind == "f") {
        floats_.emplace_back(position, argument);
      } else if (kind == "map") {
        mapped_.push_back(position);
      } else if (kind != "zero") {
        // The lower half of a 64-bit number is the 32-bit one.
        numbers_.push_back(numbers.at(argument));
        fixed_[position] = &numbers_.back();
      }
    }
    std::sort(floats_.begin(), floats_.end(), [](const auto& a, const auto& b) { return a.second < b.second; });
  }
  Launch(const Launch&) = delete;
  Launch& operator=(const Launch&) = delete;

  // `tensors` are the addresses that the leading arguments of the kernel have, `numbers` its floats in their order.
  void operator()(const void* const* tensors, const float* numbers, void* stream) {
    TORCH_CHECK(threads_ != 0, "a launch of another extension was taken for one of Triton's");
    std::array<Map, kMostMaps> maps;
    auto parameters = fixed_;
    for (const auto& [position, argument] : tensors_) parameters[position] = const_cast<const void**>(&tensors[argument]);
    for (const auto& [position, argument] : floats_) parameters[position] = const_cast<float*>(numbers++);
    for (size_t rank = 0; rank < shapes_.size(); ++rank) {
      copy_map(rank, tensors[shapes_[rank].argument], maps[rank]);
      parameters[mapped_[rank]] = &maps[rank];
    }
    const int error = in_context([&] {
      return driver.launch(function_, grid_[0], grid_[1], grid_[2], threads_, 1, 1, shared_, stream, parameters.data(),
                           nullptr);
    });
    TORCH_CHECK(error == 0, "the CUDA driver refused a kernel launch with error " + std::to_string(error));
  }

  // Of what another extension launches, the function that does.
  void* function() const { return function_; }

  // The floats of memory that the kernel works in, and the zeros that it counts in.
  const int64_t workspace_size, counters;
  // The kernel's, as launches.py has it.
  const std::string name;

 private:
  struct alignas(64) Map {
    std::array<unsigned char, 128> bytes;
  };
  static constexpr size_t kMostParameters = 128, kMostMaps = 16, kMostEncoded = 1024;
  static constexpr int kL2Promotion128B = 2;
  // What a thread is told that has not called CUDA yet, as autograd's may not have.
  static constexpr int kNoContext = 201;

  // What a call of the driver returns in a thread that has a context by then.
  template <typename Call>
  int in_context(const Call& call) const {
    const int error = call();
    if (error != kNoContext) return error;
    driver.set_context(context_);
    return call();
  }

  // Allocators hand out the same places again, so a map is encoded once for each.
  void copy_map(size_t rank, const void* address, Map& out) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto& encoded = encoded_[rank];
    const auto found = encoded.find(address);
    if (found != encoded.end()) {
      out = found->second;
      return;
    }
    const MapShape& shape = shapes_[rank];
    const std::array<uint64_t, 2> sizes{shape.columns, shape.rows};
    const std::array<uint32_t, 2> box{shape.box_columns, shape.box_rows}, steps{1, 1};
    const int error = in_context([&] {
      return driver.encode_map(&out, shape.type, 2, const_cast<void*>(address), sizes.data(), &shape.row_bytes,
                               box.data(), steps.data(), 0, shape.swizzle, kL2Promotion128B, 0);
    });
    TORCH_CHECK(error == 0, "the CUDA driver refused a tensor map for [" + std::to_string(shape.rows) + ", " +
                                std::to_string(shape.columns) + "] with error " + std::to_string(error));
    if (encoded.size() >= kMostEncoded) encoded.clear();
    encoded.emplace(address, out);
  }

  void *function_, *context_;
  std::array<unsigned, 3> grid_;
  unsigned threads_, shared_;
  std::vector<MapShape> shapes_;
  std::vector<std::pair<size_t, int>> tensors_, floats_;
  std::vector<size_t> mapped_;
  std::vector<int64_t> numbers_;
  std::array<void*, kMostParameters> fixed_{};
  std::array<uint64_t, 2> zeros_{};
  std::mutex mutex_;
  std::vector<std::unordered_map<const void*, Map>> encoded_;
};

}  // namespace lora_kernels::host
