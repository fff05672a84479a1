// Values that tensors have for each channel.
#pragma once

#include "gencore/types.h"

namespace gencore {

// One value per channel, or per sample and channel: that of sample n and channel c is element n * stride + c.
struct ChannelValues {
  // Null: left out.
  const void* data;
  // That of the tensor, or float32.
  DType dtype;
  // 0: all samples share the values.
  std::int64_t stride;
};

}  // namespace gencore
