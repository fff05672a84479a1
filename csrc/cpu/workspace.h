// Scratch memory of one call: one slice per thread, allocated before anything is written.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace gencore::cpu {
namespace {

template <class T>
class Workspace {
 public:
  Workspace(int threads, std::int64_t per_thread)
      : per_thread_((per_thread + padding - 1) / padding * padding + padding),
        memory_(static_cast<T*>(
            std::malloc(static_cast<std::size_t>(threads) * static_cast<std::size_t>(per_thread_) * sizeof(T)))) {}
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { std::free(memory_); }

  bool ok() const { return memory_ != nullptr; }
  T* of_thread(int thread) const { return memory_ + thread * per_thread_; }

 private:
  // A cache line and more between two threads' slices.
  static constexpr std::int64_t padding = 32;
  std::int64_t per_thread_;
  T* memory_;
};

}  // namespace
}  // namespace gencore::cpu
