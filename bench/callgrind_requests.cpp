// What a program under callgrind asks of it, for Python's ctypes: see instructions_host.py.
#include <valgrind/callgrind.h>

extern "C" {

void start() {
  CALLGRIND_START_INSTRUMENTATION;
}
void stop() {
  CALLGRIND_STOP_INSTRUMENTATION;
}
void zero() {
  CALLGRIND_ZERO_STATS;
}
void dump(const char* name) {
  CALLGRIND_DUMP_STATS_AT(name);
}
}
