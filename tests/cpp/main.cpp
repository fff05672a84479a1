// Prints what the installed library computes, as the hexadecimal bits of each value, one line per tensor:
//   consumer SEED STREAM FIRST_SAMPLE SAMPLES ELEMENTS THREADS
#include <gencore/attention.h>
#include <gencore/group_norm.h>
#include <gencore/normal.h>
#include <gencore/reparameterize.h>
#include <gencore/simd.h>

#ifdef WITH_CUDA
#include <gencore/cuda.h>
#endif

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace {

void print(const char* name, const std::vector<float>& values) {
  std::printf("%s", name);
  for (const float value : values) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    std::printf(" %08x", static_cast<unsigned>(bits));
  }
  std::printf("\n");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 7) return 2;
  std::int64_t argument[6];
  for (int i = 0; i < 6; ++i) argument[i] = std::atoll(argv[i + 1]);
  const gencore::NoiseKey key{argument, 0};
  const std::int64_t samples = argument[3], elements = argument[4];
  const gencore::NoiseShape shape{samples, 1, elements, 0};
  const int threads = static_cast<int>(argument[5]);
  const auto size = static_cast<std::size_t>(samples * elements);

  std::vector<float> noise(size);
  auto status = gencore::cpu::normal(noise.data(), gencore::DType::float32, shape, key, threads);
  if (status != gencore::Status::ok) return 1;

  // mu = i / 8 and logvar = (i mod 5) - 2 for element i.
  std::vector<float> mu(size), logvar(size), z(size), kl(static_cast<std::size_t>(samples));
  for (std::size_t i = 0; i < size; ++i) {
    mu[i] = static_cast<float>(i) / 8;
    logvar[i] = static_cast<float>(i % 5) - 2;
  }
  status = gencore::cpu::reparameterize(
      {mu.data(), logvar.data(), z.data(), nullptr, kl.data(), gencore::DType::float32, shape, key}, threads);
  if (status != gencore::Status::ok) return 1;

  // The noise as one group per sample, normalized, with SiLU behind.
  std::vector<float> y(size);
  gencore::GroupNorm norm{};
  norm.x = noise.data();
  norm.y = y.data();
  norm.shape = {samples, 1, elements, 1, false};
  norm.eps = 1e-5;
  norm.activation = gencore::Activation::silu;
  if (gencore::cpu::group_norm(norm, threads) != gencore::Status::ok) return 1;

  // The noise of each sample as tokens of one channel, which attend to each other.
  std::vector<float> attended(size);
  const auto tokens = [&](std::vector<float>& values) {
    return gencore::HeadsTensor{values.data(), elements, elements, 1, 1};
  };
  gencore::Attention attention{};
  attention.q = attention.k = attention.v = tokens(noise);
  attention.out = tokens(attended);
  attention.shape = {samples, 1, elements, elements, 1};
  attention.scale = 1;
  if (gencore::cpu::attention(attention, threads) != gencore::Status::ok) return 1;

  std::printf("level %s\n", gencore::cpu::name(gencore::cpu::simd_level()));
  print("normal", noise);
  print("z", z);
  print("kl", kl);
  print("y", y);
  print("attended", attended);

  // What is wrong is a status, in words.
  status = gencore::cpu::normal(nullptr, gencore::DType::float32, shape, key, threads);
  std::printf("refused %s\n", gencore::message(status));
#ifdef WITH_CUDA
  std::printf("cuda %s\n",
              gencore::cuda::message(gencore::cuda::normal(nullptr, gencore::DType::float32, shape, key, nullptr)));
#endif
}
