// Chooses tiles, describes the operands to TMA and launches the Hopper kernel.
#include "hopper_one_pass.h"

#include <algorithm>
#include <climits>
#include <iterator>

#include "hopper_one_pass.cuh"

namespace lora_kernels {
namespace {

using namespace hopper;

constexpr HopperTiles kCandidates[] = {{256, 2}, {256, 1}, {128, 2}, {128, 1}};

// Of X, for which L2 is a cache: on an H100, two halves of 25 MB, each of which has its own copies.
constexpr int64_t kBytesThatStay = int64_t{24} << 20;

// Speed per output element, relative to the best: measured at 8192 x 4096 -> 4096.
double rate(HopperTiles tiles) {
  if (tiles.block_n == 256) return tiles.cluster == 2 ? 1.0 : 0.88;
  return tiles.cluster == 2 ? 0.84 : 0.66;
}

bool is_narrow(DType dtype) { return dtype != DType::kFloat32; }

// A matrix as it lies in memory: `outer` rows of `inner` neighbouring numbers.
struct Stored {
  const void* data;
  int64_t inner, outer, stride;
  bool addressable;  // by TMA, as 16-bit numbers
};

Stored stored(const Matrix& matrix, int64_t rows, int64_t columns, bool by_rows, DType dtype) {
  Stored result{matrix.data, by_rows ? columns : rows, by_rows ? rows : columns,
                by_rows ? matrix.row_stride : matrix.column_stride, false};
  if (result.outer == 1) result.stride = divide_up(result.inner, 8) * 8;
  const int64_t inner_stride = by_rows ? matrix.column_stride : matrix.row_stride;
  result.addressable = matrix.dtype == dtype && (inner_stride == 1 || result.inner == 1) && result.stride % 8 == 0 &&
                       result.stride >= result.inner && result.stride < int64_t{1} << 39 &&
                       reinterpret_cast<uintptr_t>(matrix.data) % 16 == 0;
  return result;
}

Stored stored_x(const OnePass& p) { return stored(p.x, p.M, p.K, true, p.dtype); }
Stored stored_weight(const OnePass& p, bool by_rows) { return stored(p.weight, p.K, p.N, by_rows, p.dtype); }

// Whether W lies in memory as [K, N], as it does in the backward.
bool lies_by_rows(const OnePass& p) { return !stored_weight(p, false).addressable; }

// ------------------------------------------------------------------------------------------------- sizes

// Cuts K into at most so many parts, and at least one.
void divide_k(Launch& launch, int parts) {
  parts = std::max(1, std::min({parts, kMaxParts, launch.k_steps}));
  launch.steps_per_part = static_cast<int>(divide_up(launch.k_steps, parts));
  launch.parts = static_cast<int>(divide_up(launch.k_steps, launch.steps_per_part));
  launch.shares = launch.parts * launch.rank_chunks;
}

// Units that have a tile less than others, or none, and are done with all of S when those are done with a tile; none if
// they would not be. A step of a share, which waits for X alone, takes about as long as that of a tile of 128 columns.
int sharers(const Launch& launch, int block_n, int most_units) {
  const OnePass& p = launch.problem;
  // What the mask takes is time that waiting for X does not leave.
  if (p.mask_x && p.dropout.seed != nullptr) return 0;
  const int tiles = launch.row_units * launch.column_tiles, spare = most_units - 1 - (tiles - 1) % most_units;
  // Between a quarter of the units with a tile less, where it was a gain, and a half, where it was none (docs/kernels.md).
  if (tiles > most_units && 5 * spare > 2 * most_units) return 0;
  const bool in_time = int64_t{launch.row_units} * launch.rank_chunks * 128 <= int64_t{spare} * block_n;
  return in_time ? spare : 0;
}

// Everything in a launch but addresses.
Launch plan(const OnePass& p, HopperTiles tiles, int multiprocessors) {
  Launch launch{};
  launch.problem = p;
  launch.cluster = tiles.cluster;
  launch.row_units = static_cast<int>(divide_up(p.M, kBlockM * tiles.cluster));
  launch.column_tiles = static_cast<int>(divide_up(p.N, tiles.block_n));
  launch.k_steps = static_cast<int>(divide_up(p.K, kBlockK));
  launch.rank_chunks = static_cast<int>(divide_up(p.R, kRankChunk));
  const int most_units = std::max(1, multiprocessors / tiles.cluster), chunks = launch.row_units * launch.rank_chunks;
  const int spare = sharers(launch, tiles.block_n, most_units);
  if (spare > 0) {
    divide_k(launch, spare / chunks);
    launch.sharers = std::min(spare, launch.row_units * launch.shares);
  } else {
    // As many sharing tiles as there are units in the first wave, so that the extra work is spread over all.
    divide_k(launch, std::min(most_units / chunks, launch.column_tiles / launch.rank_chunks));
  }
  launch.units = std::min(most_units, launch.row_units * launch.column_tiles + launch.sharers);
  launch.x_stays = 2 * p.M * p.K <= kBytesThatStay;
  return launch;
}

struct Workspace {
  size_t partials, down, up, end;  // offsets in bytes; fragments come first
  int64_t down_stride, up_stride;  // of the adapters, where they are stored anew
};

Workspace workspace_of(const Launch& launch) {
  const OnePass& p = launch.problem;
  const bool by_rows = lies_by_rows(p);
  const size_t chunks = static_cast<size_t>(launch.halves()) * launch.rank_chunks;
  Workspace w{};
  w.down_stride = divide_up(by_rows ? p.R : p.K, 8) * 8;
  w.up_stride = divide_up(by_rows ? p.N : p.R, 8) * 8;
  w.partials = chunks * 2 * kGroupThreads * sizeof(uint4);
  w.down = w.partials + chunks * launch.parts * 4 * kGroupThreads * sizeof(float4);
  w.up = w.down + divide_up(2 * w.down_stride * (by_rows ? p.K : p.R), 256) * 256;
  w.end = w.up + divide_up(2 * w.up_stride * (by_rows ? p.R : p.N), 256) * 256;
  return w;
}

// ------------------------------------------------------------------------------------------------- adapters

// A matrix to store anew, in the base's dtype and as TMA needs it.
struct Repack {
  Matrix from;
  int64_t rows, columns;
  bool by_rows;
  void* to;
  int64_t stride;
};
struct Repacks {
  Repack adapter[2];
};

template <class T>
__global__ void repack_kernel(Repacks repacks) {
  const Repack& r = repacks.adapter[blockIdx.y];
  if (r.to == nullptr) return;
  const int64_t inner = r.by_rows ? r.columns : r.rows;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < r.rows * r.columns; i += step) {
    const int64_t row = r.by_rows ? i / inner : i % inner, column = r.by_rows ? i % inner : i / inner;
    const int64_t place = row * r.from.row_stride + column * r.from.column_stride;
    const float number = load_number(r.from.data, r.from.dtype, place);
    static_cast<T*>(r.to)[i / inner * r.stride + i % inner] = from_float<T>(number);
  }
}

// D and U as TMA can read them; whichever it cannot read where it lies is stored anew in the workspace.
cudaError_t prepare_adapters(const Launch& launch, uint8_t* workspace, Stored& down, Stored& up, cudaStream_t stream) {
  const OnePass& p = launch.problem;
  const bool by_rows = lies_by_rows(p);
  const Workspace w = workspace_of(launch);
  down = stored(p.down, p.K, p.R, by_rows, p.dtype);
  up = stored(p.up, p.R, p.N, by_rows, p.dtype);
  if (down.addressable && up.addressable) return cudaSuccess;
  Repacks repacks{
      {{p.down, p.K, p.R, by_rows, nullptr, w.down_stride}, {p.up, p.R, p.N, by_rows, nullptr, w.up_stride}}};
  if (!down.addressable) {
    down.data = repacks.adapter[0].to = workspace + w.down;
    down.stride = w.down_stride;
  }
  if (!up.addressable) {
    up.data = repacks.adapter[1].to = workspace + w.up;
    up.stride = w.up_stride;
  }
  constexpr int kRepackThreads = 256;
  const int64_t blocks = std::min<int64_t>(divide_up(std::max(p.K, p.N) * p.R, kRepackThreads), 1024);
  const dim3 grid(static_cast<unsigned>(blocks), 2);
  if (p.dtype == DType::kFloat16) {
    repack_kernel<half><<<grid, kRepackThreads, 0, stream>>>(repacks);
  } else {
    repack_kernel<bf16><<<grid, kRepackThreads, 0, stream>>>(repacks);
  }
  return cudaGetLastError();
}

// ------------------------------------------------------------------------------------------------- tensor maps

using Encode = decltype(&cuTensorMapEncodeTiled);

struct Encoder {
  cudaError_t error;
  Encode encode;
};

// Through the runtime, so that nothing has to be linked to the driver.
Encoder find_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess) return {error, nullptr};
  if (found != cudaDriverEntryPointSuccess) return {cudaErrorNotSupported, nullptr};
  return {cudaSuccess, reinterpret_cast<Encode>(function)};
}

// Remembers a failure, so that maps can be made one after the other.
struct MapMaker {
  Encode encode;
  DType dtype;
  bool failed = false;

  void make(CUtensorMap& map, const Stored& matrix, int box_inner, int box_outer) {
    const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(matrix.inner), static_cast<cuuint64_t>(matrix.outer)};
    const cuuint64_t strides[1] = {static_cast<cuuint64_t>(matrix.stride) * 2};
    const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_inner), static_cast<cuuint32_t>(box_outer)};
    const cuuint32_t steps[2] = {1, 1};
    const auto type = dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    const auto swizzle = box_inner == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
    failed |= encode(&map, type, 2, const_cast<void*>(matrix.data), sizes, strides, box, steps,
                     CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                     CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) != CUDA_SUCCESS;
  }
};

cudaError_t make_maps(Launch& launch, const Stored& down, const Stored& up, int block_n) {
  const OnePass& p = launch.problem;
  static const Encoder encoder = find_encoder();
  if (encoder.error != cudaSuccess) return encoder.error;
  const bool by_rows = lies_by_rows(p);
  MapMaker maker{encoder.encode, p.dtype};
  // A box of W or U: half of a tile's columns where K is contiguous, else as many as the swizzle is wide.
  const int w_rows = by_rows ? kBlockK : block_n / 2;
  maker.make(launch.x, stored_x(p), kBlockK, kBlockM);
  maker.make(launch.weight, stored_weight(p, by_rows), 64, w_rows);
  maker.make(launch.up, up, 64, w_rows);
  maker.make(launch.down, down, by_rows ? kRankChunk : kBlockK, by_rows ? kBlockK : kRankChunk);
  return maker.failed ? cudaErrorInvalidValue : cudaSuccess;
}

// ------------------------------------------------------------------------------------------------- launch

template <class C>
cudaError_t start(const Launch& launch, cudaStream_t stream) {
  const auto kernel = one_pass_kernel<C>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSharedBytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(launch.cluster);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(launch.units * launch.cluster));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = C::kSharedBytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, launch);
}

template <class T, int BLOCK_N>
cudaError_t start_layout(const Launch& launch, cudaStream_t stream) {
  const bool masked = launch.problem.dropout.seed != nullptr;
  if (lies_by_rows(launch.problem)) {
    return masked ? start<Config<T, BLOCK_N, true, true>>(launch, stream)
                  : start<Config<T, BLOCK_N, true, false>>(launch, stream);
  }
  return masked ? start<Config<T, BLOCK_N, false, true>>(launch, stream)
                : start<Config<T, BLOCK_N, false, false>>(launch, stream);
}

template <class T>
cudaError_t start_dtype(const Launch& launch, int block_n, cudaStream_t stream) {
  return block_n == 256 ? start_layout<T, 256>(launch, stream) : start_layout<T, 128>(launch, stream);
}

cudaError_t multiprocessor_count(int& count) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  return error != cudaSuccess ? error : cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
}

}  // namespace

bool hopper_one_pass_fits(const OnePass& p) {
  if (!is_narrow(p.dtype) || p.precision == Precision::kSplit) return false;
  if (std::max({p.M, p.N, p.K}) > INT_MAX / 2 || p.N % 8 != 0) return false;
  if (reinterpret_cast<uintptr_t>(p.out) % 16 != 0 || !stored_x(p).addressable) return false;
  const bool by_rows = lies_by_rows(p);
  if (by_rows && !stored_weight(p, true).addressable) return false;
  // The mask on S U comes with the backward's layout of W, the one on X with the forward's.
  if (p.dropout.seed != nullptr && p.mask_x == by_rows) return false;
  return divide_up(p.R, kRankChunk) <= divide_up(p.N, 256);
}

HopperTiles hopper_tiles(const OnePass& p, int multiprocessors) {
  const auto cost = [&](HopperTiles tiles) {
    const Launch launch = plan(p, tiles, multiprocessors);
    const int64_t count = static_cast<int64_t>(launch.row_units) * launch.column_tiles;
    const int64_t waves = divide_up(count, std::max(1, multiprocessors / tiles.cluster));
    return static_cast<double>(waves * tiles.block_n) / rate(tiles);
  };
  return *std::min_element(std::begin(kCandidates), std::end(kCandidates),
                           [&](HopperTiles a, HopperTiles b) { return cost(a) < cost(b); });
}

size_t hopper_workspace_bytes(const OnePass& p, int multiprocessors) {
  size_t bytes = 0;
  for (const HopperTiles tiles : kCandidates) {
    bytes = std::max(bytes, workspace_of(plan(p, tiles, multiprocessors)).end);
  }
  return bytes;
}

size_t hopper_counter_count(const OnePass& p) {
  const size_t halves = 4 * divide_up(p.M, 2 * kBlockM);
  return 2 + halves * (1 + divide_up(p.R, kRankChunk));
}

cudaError_t hopper_one_pass(const OnePass& p, HopperTiles tiles, void* workspace, int* counters, cudaStream_t stream) {
  int multiprocessors = 0;
  cudaError_t error = multiprocessor_count(multiprocessors);
  if (error != cudaSuccess) return error;
  Launch launch = plan(p, tiles, multiprocessors);
  uint8_t* bytes = static_cast<uint8_t*>(workspace);
  launch.fragments = reinterpret_cast<uint4*>(bytes);
  launch.partials = reinterpret_cast<float4*>(bytes + workspace_of(launch).partials);
  launch.counters = counters;
  Stored down, up;
  error = prepare_adapters(launch, bytes, down, up, stream);
  if (error == cudaSuccess) error = make_maps(launch, down, up, tiles.block_n);
  if (error != cudaSuccess) return error;
  return p.dtype == DType::kFloat16 ? start_dtype<half>(launch, tiles.block_n, stream)
                                    : start_dtype<bf16>(launch, tiles.block_n, stream);
}

cudaError_t hopper_one_pass(const OnePass& p, void* workspace, int* counters, cudaStream_t stream) {
  int multiprocessors = 0;
  const cudaError_t error = multiprocessor_count(multiprocessors);
  if (error != cudaSuccess) return error;
  return hopper_one_pass(p, hopper_tiles(p, multiprocessors), workspace, counters, stream);
}

}  // namespace lora_kernels
