#include "emulator.h"

#include <ucontext.h>

#include <cstdio>
#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace vitrail::emulator {
namespace {

constexpr std::size_t kStack = 128 * 1024;
constexpr int kWarp = 32;
constexpr int kNobody = -1;

struct Copy {
  uint32_t offset, bytes;
  const void* source;
  bool present;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
  const int* awaited = nullptr;  // it waits until this counter has left `seen`
  int seen = 0;
  std::vector<Copy> copies;              // not yet in a group
  std::deque<std::vector<Copy>> groups;  // oldest first
};

struct Warp {
  int arrived = 0;
  int generation = 0;
  const char* operation = nullptr;
  alignas(16) char operands[2][kWarp * 64];
  int barrier_arrived = 0;
  int epoch = 0;  // warp barriers passed
};

// Who touched a byte of shared memory last, and when; barriers of the CTA and of the toucher's warp count as time.
struct Touch {
  int thread = kNobody;
  int epoch = -1, warp_epoch = -1;
  bool by_others = false;  // other lanes of the same warp did so, too, at the same time
  bool by_other_warps = false;
};
struct Byte {
  Touch read, write;
  bool written = false;
  int in_flight = 0;
};

struct Buffer {
  const char* start;
  std::size_t bytes;
};

struct Machine {
  ucontext_t scheduler;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<unsigned char> shared;
  std::vector<Byte> bytes;
  std::vector<Buffer> buffers;
  int block = 0;
  int current = 0;
  int arrived = 0, epoch = 0;  // of the CTA's barrier
  int64_t bank_conflicts = 0;
  std::string error;
  void (*kernel)(void**) = nullptr;
  void** arguments = nullptr;
};
Machine machine;

Fiber& fiber() { return machine.fibers[machine.current]; }
Warp& warp() { return machine.warps[machine.current / kWarp]; }

void to_scheduler() { swapcontext(&fiber().context, &machine.scheduler); }

// Ends the launch; the fibers are never resumed.
template <typename... Values>
[[noreturn]] void fail(const char* format, Values... values) {
  char text[400];
  std::snprintf(text, sizeof(text), format, values...);
  machine.error = "CTA " + std::to_string(machine.block) + ", thread " + std::to_string(machine.current) + ": " + text;
  for (;;) to_scheduler();
}

void wait_until_changed(const int& counter) {
  fiber().awaited = &counter;
  fiber().seen = counter;
  to_scheduler();
  fiber().awaited = nullptr;
}

bool ordered(const Touch& touch) {
  const bool same_warp = touch.thread / kWarp == machine.current / kWarp;
  return touch.epoch != machine.epoch ||
         (same_warp && !touch.by_other_warps &&
          (touch.warp_epoch != warp().epoch || (touch.thread == machine.current && !touch.by_others)));
}

void note(Touch& touch) {
  const bool others_now = touch.thread != kNobody && touch.epoch == machine.epoch && touch.thread != machine.current;
  const bool same_warp = touch.thread / kWarp == machine.current / kWarp;
  const bool still = touch.epoch == machine.epoch && touch.warp_epoch == warp().epoch && same_warp;
  touch.by_other_warps = touch.epoch == machine.epoch && (touch.by_other_warps || (others_now && !same_warp));
  touch.by_others = (still && touch.by_others) || (still && others_now);
  touch.thread = machine.current;
  touch.epoch = machine.epoch;
  touch.warp_epoch = warp().epoch;
}

void check_range(uint32_t offset, uint32_t bytes) {
  if (std::size_t{offset} + bytes > machine.bytes.size() || offset % bytes != 0) {
    fail("%u bytes at shared offset %u are outside the %zu bytes or not aligned", bytes, offset, machine.bytes.size());
  }
}

void note_read(uint32_t offset, uint32_t bytes) {
  for (uint32_t i = offset; i < offset + bytes; ++i) {
    Byte& byte = machine.bytes[i];
    if (byte.in_flight) fail("reads shared byte %u while an asynchronous copy to it is under way", i);
    if (!byte.written) fail("reads shared byte %u, which nothing was written to", i);
    if (!ordered(byte.write)) fail("race: reads shared byte %u, which thread %d wrote", i, byte.write.thread);
    note(byte.read);
  }
}

void note_write(uint32_t offset, uint32_t bytes) {
  for (uint32_t i = offset; i < offset + bytes; ++i) {
    Byte& byte = machine.bytes[i];
    if (byte.in_flight) fail("writes shared byte %u while an asynchronous copy to it is under way", i);
    if (!ordered(byte.read)) fail("race: writes shared byte %u, which thread %d read", i, byte.read.thread);
    if (!ordered(byte.write)) fail("race: writes shared byte %u, which thread %d wrote", i, byte.write.thread);
    note(byte.write);
    byte.written = true;
  }
}

void run_fiber() {
  machine.kernel(machine.arguments);
  fiber().done = true;
  for (;;) to_scheduler();
}

// One CTA, until all its threads have ended.
void run_block(int threads, int shared_bytes) {
  machine.fibers.resize(threads);
  machine.warps.assign(threads / kWarp, Warp{});
  machine.shared.assign(shared_bytes, 0xff);
  machine.bytes.assign(shared_bytes, Byte{});
  machine.arrived = machine.epoch = 0;
  for (Fiber& fiber : machine.fibers) {
    if (!fiber.stack) fiber.stack.reset(new char[kStack]);
    fiber.done = false;
    fiber.awaited = nullptr;
    fiber.copies.clear();
    fiber.groups.clear();
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
  }
  for (bool any = true; any;) {
    any = false;
    bool waiting = false;
    for (machine.current = 0; machine.current < threads; ++machine.current) {
      Fiber& next = fiber();
      if (next.done) continue;
      if (next.awaited != nullptr && *next.awaited == next.seen) {
        waiting = true;
        continue;
      }
      any = true;
      swapcontext(&machine.scheduler, &next.context);
      if (!machine.error.empty()) return;
    }
    if (!any && waiting) {
      for (machine.current = 0; fiber().done || fiber().awaited == nullptr;) ++machine.current;
      machine.error =
          "thread " + std::to_string(machine.current) + " waits for threads that have ended or wait elsewhere";
    }
  }
  for (machine.current = 0; machine.current < threads; ++machine.current) {
    for (const auto& group : fiber().groups) {
      if (!group.empty()) machine.error = "a thread has ended with an asynchronous copy under way";
    }
    if (!fiber().copies.empty()) machine.error = "a thread has ended with an asynchronous copy in no group";
  }
}

}  // namespace

int thread_index() { return machine.current; }
int block_index() { return machine.block; }

void block_barrier() {
  if (++machine.arrived == static_cast<int>(machine.fibers.size())) {
    machine.arrived = 0;
    ++machine.epoch;
  } else {
    wait_until_changed(machine.epoch);
  }
}

void warp_barrier() {
  if (++warp().barrier_arrived == kWarp) {
    warp().barrier_arrived = 0;
    ++warp().epoch;
  } else {
    wait_until_changed(warp().epoch);
  }
}

const void* read_shared(uint32_t offset, uint32_t bytes) {
  check_range(offset, bytes);
  note_read(offset, bytes);
  return machine.shared.data() + offset;
}

void* write_shared(uint32_t offset, uint32_t bytes) {
  check_range(offset, bytes);
  note_write(offset, bytes);
  return machine.shared.data() + offset;
}

void copy_async(uint32_t offset, const void* source, uint32_t bytes, bool present) {
  check_range(offset, bytes);
  if (present) {
    check_global(source, bytes);
  }
  note_write(offset, bytes);
  for (uint32_t i = offset; i < offset + bytes; ++i) ++machine.bytes[i].in_flight;
  fiber().copies.push_back({offset, bytes, source, present});
}

void commit_copies() {
  fiber().groups.push_back(std::move(fiber().copies));
  fiber().copies.clear();
}

void wait_for_copies(int pending) {
  auto& groups = fiber().groups;
  for (; groups.size() > static_cast<std::size_t>(pending); groups.pop_front()) {
    for (const Copy& copy : groups.front()) {
      for (uint32_t i = copy.offset; i < copy.offset + copy.bytes; ++i) --machine.bytes[i].in_flight;
      note_write(copy.offset, copy.bytes);
      unsigned char* to = machine.shared.data() + copy.offset;
      if (copy.present) {
        std::memcpy(to, copy.source, copy.bytes);
      } else {
        std::memset(to, 0, copy.bytes);
      }
    }
  }
}

void check_global(const void* pointer, std::size_t bytes) {
  const char* start = static_cast<const char*>(pointer);
  if (reinterpret_cast<std::uintptr_t>(start) % bytes != 0) fail("%zu bytes of global memory are not aligned", bytes);
  for (const Buffer& buffer : machine.buffers) {
    if (start >= buffer.start && start + bytes <= buffer.start + buffer.bytes) return;
  }
  for (const Buffer& buffer : machine.buffers) {
    if (start >= buffer.start - 4096 && start < buffer.start + buffer.bytes + 4096) {
      fail("%zu bytes at %td of a buffer of %zu bytes", bytes, start - buffer.start, buffer.bytes);
    }
  }
  fail("%zu bytes of global memory that belong to no argument", bytes);
}

void* gather_bytes(const void* mine, std::size_t bytes, const char* operation) {
  Warp& own = warp();
  if (own.arrived == 0) own.operation = operation;
  if (std::strcmp(own.operation, operation) != 0) {
    fail("is at %s where another lane of its warp is at %s", operation, own.operation);
  }
  char* operands = own.operands[own.generation & 1];
  std::memcpy(operands + machine.current % kWarp * bytes, mine, bytes);
  if (++own.arrived == kWarp) {
    own.arrived = 0;
    ++own.generation;
  } else {
    wait_until_changed(own.generation);
  }
  return operands;
}

void count_bank_conflicts(const Lanes<uint32_t>& rows) {
  if (machine.current % kWarp != 0) return;
  for (int matrix = 0; matrix < 4; ++matrix) {
    int rows_of_column[8] = {}, most = 0;
    for (int row = 0; row < 8; ++row) {
      const int count = ++rows_of_column[rows[8 * matrix + row] / 16 % 8];
      most = count > most ? count : most;
    }
    machine.bank_conflicts += most - 1;
  }
}

}  // namespace vitrail::emulator

// Runs `kernel` (a `..._run` function) on a grid; `buffers` are the memory its pointers may reach. Returns the extra
// turns of shared memory that bank conflicts cost, or -1 with a message.
extern "C" int64_t emulate(void (*kernel)(void**), void** arguments, int grid, int threads, int shared_bytes,
                           void* const* buffers, const int64_t* buffer_bytes, int num_buffers, char* message,
                           int message_bytes) {
  using vitrail::emulator::machine;
  machine.kernel = kernel;
  machine.arguments = arguments;
  machine.bank_conflicts = 0;
  machine.error.clear();
  machine.buffers.clear();
  for (int i = 0; i < num_buffers; ++i) {
    machine.buffers.push_back({static_cast<const char*>(buffers[i]), static_cast<std::size_t>(buffer_bytes[i])});
  }
  for (machine.block = 0; machine.block < grid; ++machine.block) {
    vitrail::emulator::run_block(threads, shared_bytes);
    if (!machine.error.empty()) {
      std::snprintf(message, static_cast<std::size_t>(message_bytes), "%s", machine.error.c_str());
      return -1;
    }
  }
  return machine.bank_conflicts;
}
