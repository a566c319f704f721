#include <ucontext.h>

#include <memory>
#include <vector>

#include "hopper_one_pass.h"
#include "launches.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

uint64_t shown[32][32];

namespace {

constexpr size_t kStack = 1 << 18;

struct Meeting {
  int expected = 0, arrived = 0, held = 0;
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool ended = false;
};

Meeting of_block, of_warp[32];
std::vector<Thread> threads;
ucontext_t scheduler;
const std::function<void()>* body;

void meet(Meeting& meeting) {
  const int mine = meeting.held;
  if (++meeting.arrived == meeting.expected) {
    meeting.arrived = 0;
    ++meeting.held;
    return;
  }
  while (meeting.held == mine) swapcontext(&threads[threadIdx.x].context, &scheduler);
}

void enter() {
  (*body)();
  threads[threadIdx.x].ended = true;
  swapcontext(&threads[threadIdx.x].context, &scheduler);
}

void run_block(int count) {
  of_block = {count};
  for (Meeting& meeting : of_warp) meeting = {32};
  for (Thread& thread : threads) {
    thread.ended = false;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    makecontext(&thread.context, enter, 0);
  }
  for (int left = count; left > 0;) {
    left = 0;
    for (int t = 0; t < count; ++t) {
      if (threads[t].ended) continue;
      threadIdx = dim3(t, 0, 0);
      swapcontext(&scheduler, &threads[t].context);
      left += !threads[t].ended;
    }
  }
}

}  // namespace

void meet_block() { meet(of_block); }
void meet_warp() { meet(of_warp[warp()]); }
int warp() { return static_cast<int>(threadIdx.x / 32); }
int lane() { return static_cast<int>(threadIdx.x % 32); }

void run(dim3 grid, int count, const std::function<void()>& thread) {
  body = &thread;
  blockDim = dim3(count);
  gridDim = grid;
  threads.clear();
  threads.resize(count);
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = dim3(x, y, 0);
      run_block(count);
    }
  }
}

}  // namespace emulation

// Nobody calls what a chip of its own is needed for.
namespace lora_kernels {

bool hopper_one_pass_fits(const OnePass&) { return false; }
size_t hopper_workspace_bytes(const OnePass&, int) { return 0; }
size_t hopper_counter_count(const OnePass&) { return 0; }
cudaError_t hopper_one_pass(const OnePass&, void*, int*, cudaStream_t) { return cudaSuccess; }

}  // namespace lora_kernels
