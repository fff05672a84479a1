// How the work of an op is cut and given to threads, and how a thread reads and writes its part of a tensor.
//
// A thread works on an item: the elements of one or two noise blocks. The items of a row (a sample) are cut into
// pieces; a team of threads, a warp or a part of one, takes a piece at a time. So rows may be short or long, one
// division serves a whole piece, and what is summed over a piece is summed in an order that the shape alone decides.
#pragma once

#include <initializer_list>

#include "lane.cuh"
#include "launch.cuh"

namespace gencore::cuda {

struct Work {
  std::int64_t rows, elements, channels, items_per_row, pieces_per_row;
  int items_per_piece;
  // The logarithm of the threads of a team, which is at most a warp.
  int team_log2;
  // Whether items lie on multiples of 16 bytes.
  bool aligned;

  std::int64_t tasks() const { return rows * pieces_per_row; }
  dim3 grid() const { return blocks_for(tasks() << team_log2); }
};

// Blocks that shall share a multiprocessor, for those of a kernel's variants that are not for binary64: it is then held
// to the registers which that leaves. More of them hide the latency of memory better.
template <class T>
constexpr int at_least(int blocks) {
  return std::is_same_v<T, double> ? 1 : blocks;
}

template <class T, bool channels_last>
constexpr int item_size = channels_last || sizeof(T) >= 4 ? 4 : 16 / sizeof(T);

// The work on tensors of `shape`, where each of `addresses` is a tensor or null. Without a limit, pieces are as long as
// leaves enough of them for every multiprocessor; with one, the cut of a row depends on nothing but the row.
template <class T, bool channels_last>
Work make_work(const NoiseShape& shape, std::initializer_list<const void*> addresses, int items_per_piece = 0) {
  constexpr std::int64_t item = item_size<T, channels_last>;
  Work work{};
  work.rows = shape.samples;
  work.elements = shape.elements;
  work.channels = channels_last ? shape.channels : 1;
  // In channels_last an item is four pixels of one channel.
  work.items_per_row = (shape.elements / work.channels + item - 1) / item * work.channels;
  if (items_per_piece == 0) {
    constexpr std::int64_t plenty = 1 << 17;
    const std::int64_t rounds = std::clamp<std::int64_t>(work.rows * work.items_per_row / plenty, 1, 8);
    items_per_piece = warp_threads * static_cast<int>(rounds);
  }
  work.pieces_per_row = std::max<std::int64_t>((work.items_per_row + items_per_piece - 1) / items_per_piece, 1);
  work.items_per_piece = items_per_piece;
  while (1 << work.team_log2 < warp_threads && 1 << work.team_log2 < work.items_per_row) ++work.team_log2;
  work.aligned = !channels_last && (shape.elements * sizeof(T) % 16 == 0 || shape.samples * shape.draws == 1);
  for (const void* address : addresses) work.aligned &= reinterpret_cast<std::uintptr_t>(address) % 16 == 0;
  return work;
}

// The elements of one item as they came from memory: converted when they are used, for only then are they waited for.
template <class T, bool channels_last>
struct Held {
  static constexpr int size = item_size<T, channels_last>;
  // Four registers for eight elements of a half type, as one access brings them.
  static constexpr bool packed = !channels_last && sizeof(T) == 2;

  std::conditional_t<packed, uint4, T[size]> elements;

  __device__ __forceinline__ void get(typename Arithmetic<T>::F (&x)[size]) const {
    if constexpr (packed) {
      uint4 behind = elements;
      ptx::keep_behind(behind);
      Vector<T>::unpack(behind, x);
    } else {
#pragma unroll
      for (int i = 0; i < size; ++i) {
        T behind = elements[i];
        ptx::keep_behind(behind);
        x[i] = to_arithmetic(behind);
      }
    }
  }
};

// The elements of one item: where they are in the first draw of a tensor, and which noise is theirs.
template <class T, bool channels_last>
struct Item {
  static constexpr int size = item_size<T, channels_last>;

  std::int64_t at, stride;
  // In a tensor of twice the channels, the first element is at `at + before`, and in the second half of them, `half`
  // behind that.
  std::int64_t before, half;
  // How many elements are inside the row; `whole` if they are all and can be read at once.
  int count;
  bool whole;
  // The first element is number `skip` of the noise block `block` of its row.
  std::uint32_t block;
  int skip;

  template <class A>
  __device__ __forceinline__ void load(const T* tensor, A (&x)[size]) const {
    if (whole) {
      using V = Vector<T>;
#pragma unroll
      for (int i = 0; i < size / V::size; ++i) {
        V::unpack(__ldg(reinterpret_cast<const typename V::Memory*>(tensor + at) + i), x + i * V::size);
      }
    } else {
#pragma unroll
      for (int i = 0; i < size; ++i) x[i] = i < count ? A(to_arithmetic(tensor[at + i * stride])) : A(0);
    }
  }

  template <class A>
  __device__ __forceinline__ void store(T* tensor, const A (&x)[size]) const {
    store_at(tensor + at, stride, x);
  }

  // Of a tensor that the launch may write to as well.
  __device__ __forceinline__ Held<T, channels_last> hold(const T* tensor) const { return hold_at(tensor + at, stride); }

  // The same for one half of a tensor of twice the channels.
  __device__ __forceinline__ Held<T, channels_last> hold_half(const T* tensor, int which) const {
    return hold_at(tensor + at + before + which * half, channels_last ? 2 * stride : stride);
  }

  template <class A>
  __device__ __forceinline__ void store_half(T* tensor, int which, const A (&x)[size]) const {
    store_at(tensor + at + before + which * half, channels_last ? 2 * stride : stride, x);
  }

 private:
  __device__ __forceinline__ Held<T, channels_last> hold_at(const T* first, std::int64_t step) const {
    Held<T, channels_last> held;
    if constexpr (Held<T, channels_last>::packed) {
      if (whole) {
        held.elements = *reinterpret_cast<const uint4*>(first);
        return held;
      }
      std::uint32_t word[size / 2];
#pragma unroll
      for (int i = 0; i < size; i += 2) {
        const std::uint32_t low = i < count ? first[i * step].bits : 0,
                            high = i + 1 < count ? first[(i + 1) * step].bits : 0;
        word[i / 2] = low | high << 16;
      }
      held.elements = make_uint4(word[0], word[1], word[2], word[3]);
    } else {
      if constexpr (!channels_last) {
        using V = Vector<T>;
        if (whole) {
#pragma unroll
          for (int i = 0; i < size / V::size; ++i) {
            V::unpack(reinterpret_cast<const typename V::Memory*>(first)[i], held.elements + i * V::size);
          }
          return held;
        }
      }
#pragma unroll
      for (int i = 0; i < size; ++i) held.elements[i] = i < count ? first[i * step] : T{};
    }
    return held;
  }

  template <class A>
  __device__ __forceinline__ void store_at(T* first, std::int64_t step, const A (&x)[size]) const {
    if (whole) {
      using V = Vector<T>;
#pragma unroll
      for (int i = 0; i < size / V::size; ++i) {
        ptx::store(reinterpret_cast<typename V::Memory*>(first) + i, V::pack(x + i * V::size));
      }
    } else {
#pragma unroll
      for (int i = 0; i < size; ++i) {
        if (i < count) from_arithmetic(x[i], first[i * step]);
      }
    }
  }
};

// Calls body(item) for this thread's items of the n from `start` on. Only what is needed per row counts in 64 bits.
template <class T, bool channels_last, class Body>
__device__ __forceinline__ void for_each_item_of_piece(const Work& work, std::int64_t row, std::int64_t start, int n,
                                                       int lane, Body&& body) {
  constexpr int size = item_size<T, channels_last>;
  const int team = 1 << work.team_log2;
  Item<T, channels_last> item;
  if constexpr (channels_last) {
    const std::int64_t pixels = work.elements / work.channels;
    std::int64_t group = (start + lane) / work.channels, channel = (start + lane) % work.channels;
    const std::int64_t group_step = team / work.channels, channel_step = team % work.channels;
    item.stride = work.channels;
    item.half = work.channels;
    item.whole = false;
    for (int i = lane; i < n; i += team) {
      const std::int64_t pixel = size * group, index = channel * pixels + pixel;
      item.before = row * work.elements + pixel * work.channels;
      item.at = item.before + channel;
      item.count = static_cast<int>(pixels - pixel < size ? pixels - pixel : size);
      item.block = static_cast<std::uint32_t>(index / 4);
      item.skip = static_cast<int>(index % 4);
      body(item);
      group += group_step;
      channel += channel_step;
      if (channel >= work.channels) {
        channel -= work.channels;
        ++group;
      }
    }
  } else {
    const std::int64_t first = row * work.elements + start * size, rest = work.elements - start * size;
    const std::uint32_t first_block = static_cast<std::uint32_t>(start * size / 4);
    int left = static_cast<int>(rest < n * size ? rest : n * size) - lane * size;
    item.stride = 1;
    item.before = row * work.elements;
    item.half = work.elements;
    item.skip = 0;
    item.at = first + lane * size;
    item.block = first_block + static_cast<std::uint32_t>(lane) * (size / 4);
    for (; left > 0; left -= team * size) {
      item.count = left < size ? left : size;
      item.whole = work.aligned && left >= size;
      body(item);
      item.at += team * size;
      item.block += static_cast<std::uint32_t>(team) * (size / 4);
    }
  }
}

// Goes through the pieces: begin(row), body(item) for every item, then finish(task) with all threads of a warp
// together; task < 0 says that the team had no piece left.
template <class T, bool channels_last, class Begin, class Body, class Finish>
__device__ __forceinline__ void for_each_item(const Work& work, Begin&& begin, Body&& body, Finish&& finish) {
  const std::int64_t thread = static_cast<std::int64_t>(blockIdx.x) * block_threads + threadIdx.x;
  const std::int64_t teams = static_cast<std::int64_t>(gridDim.x) * block_threads >> work.team_log2;
  const int lane = static_cast<int>(threadIdx.x) & ((1 << work.team_log2) - 1);
  const std::int64_t tasks = work.rows * work.pieces_per_row;
  // The first team of a warp decides when the warp ends.
  const std::int64_t first = (thread & -warp_threads) >> work.team_log2, team = thread >> work.team_log2;
  for (std::int64_t warp_task = first; warp_task < tasks; warp_task += teams) {
    const std::int64_t task = warp_task + (team - first);
    if (task < tasks) {
      const std::int64_t row = work.pieces_per_row == 1 ? task : task / work.pieces_per_row;
      const std::int64_t start = (task - row * work.pieces_per_row) * work.items_per_piece;
      const std::int64_t rest = work.items_per_row - start;
      begin(row);
      for_each_item_of_piece<T, channels_last>(
          work, row, start, static_cast<int>(rest < work.items_per_piece ? rest : work.items_per_piece), lane, body);
    }
    finish(task < tasks ? task : -1);
  }
}

}  // namespace gencore::cuda
