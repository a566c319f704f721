// How dx from a packed NF4 weight is divided among blocks: nf4_dx.cuh says what the words mean.
#pragma once

namespace lora_kernels {

struct DxPlan {
  int warps;         // of a block: column_warps beside one another, for each slice of the rows
  int column_warps;
  int strips;        // of the columns of W: column_warps * Shape::kColumns each
  int steps;         // of the rows of W: kRows each
  int groups;        // that the steps are cut into
};

}  // namespace lora_kernels
