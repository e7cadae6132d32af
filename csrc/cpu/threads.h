// A small persistent pool: a decode step makes some hundred calls of about a tenth of a millisecond
// each, and starting a thread costs as much as one of them.
#pragma once

namespace vitrail {

using Task = void (*)(const void* context, int index);

// Calls task(context, index) once for every index below `count`, on at most `threads` threads, the
// caller's among them, and returns when all calls have. Tasks must not throw. Where another thread
// is using the pool, or this is called from within a task, the caller does all the work itself. A
// forked child starts with an empty pool.
void run_tasks(int count, int threads, Task task, const void* context);

template <typename Function>
void parallel_for(int count, int threads, const Function& function) {
  run_tasks(
      count, threads,
      [](const void* context, int index) { (*static_cast<const Function*>(context))(index); },
      &function);
}

}  // namespace vitrail
