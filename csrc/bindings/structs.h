// What both modules give Python besides functions: makers of the structs that arguments are made of.
#pragma once

#include "bind.h"
#include "gencore/attention.h"
#include "gencore/bias_act.h"
#include "gencore/group_norm.h"
#include "gencore/types.h"
#include "gencore/upfirdn2d.h"

namespace gencore {

// What normal and uniform take, which have no struct in the C++ API.
struct Fill {
  void* out;
  DType dtype;
  NoiseShape shape;
  NoiseKey key;
};

inline void bind_structs(pybind11::module_& m) {
  bindings::bind_struct<NoiseKey>(m, "NoiseKey");
  bindings::bind_struct<NoiseShape>(m, "NoiseShape");
  bindings::bind_struct<Coefficients>(m, "Coefficients");
  bindings::bind_struct<HeadsTensor>(m, "HeadsTensor");
  bindings::bind_struct<AttentionShape>(m, "AttentionShape");
  bindings::bind_struct<AttentionOptions>(m, "AttentionOptions");
  bindings::bind_struct<ChannelValues>(m, "ChannelValues");
  bindings::bind_struct<GroupNormShape>(m, "GroupNormShape");
  bindings::bind_struct<GroupNormDirection>(m, "GroupNormDirection");
  bindings::bind_struct<BiasActShape>(m, "BiasActShape");
  bindings::bind_struct<BiasActSettings>(m, "BiasActSettings");
  bindings::bind_struct<ResampledAxis>(m, "ResampledAxis");
}

}  // namespace gencore
