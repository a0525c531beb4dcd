/* Threads that do one piece of work together.

   A piece of work is a function that all of them run from its start to its end. It goes
   through phases of so many pieces, which are taken by whoever comes first. A phase ends
   when its pieces are done, and not when all threads are there: one that comes late, as
   others use its core too, finds nothing left to do and goes on to where the others are.
   A phase of one piece is done by whoever ended the phase before.

   Who waits does so in a loop for SPIN_NS and then sleeps: a phase may take less than it
   takes to wake a thread, and between two steps of a live stream there is time. */

#include "threads.h"

#include <pthread.h>
#include <stdint.h>
#include <time.h>

enum { SPIN_NS = 200000, SPINS = 32, LINE = 64, CLOSED = 1 << 16 };

/* Of a thread's share of the pieces: the phase, and in the lower half how many of them
   were taken. */
typedef struct {
  _Alignas(LINE) atomic_ullong taken;
} Share;

static struct {
  pthread_mutex_t busy; /* one piece of work at a time */
  int threads;          /* that wait for work */
  void (*work)(Crew *, void *);
  void *what;
  int of;
  unsigned first_phase;
  pthread_mutex_t lock; /* for those that sleep */
  pthread_cond_t wake;
  _Alignas(LINE) atomic_uint posted; /* counts work */
  _Alignas(LINE) atomic_uint inside; /* how many work; CLOSED: no more may */
  _Alignas(LINE) atomic_long done;   /* pieces of the phase */
  _Alignas(LINE) atomic_uint phase;
  _Alignas(LINE) atomic_int asleep;
  Share shares[MAX_THREADS];
} pool = {.busy = PTHREAD_MUTEX_INITIALIZER,
          .lock = PTHREAD_MUTEX_INITIALIZER,
          .wake = PTHREAD_COND_INITIALIZER,
          .inside = CLOSED};

static void rest(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("isb");
#endif
}

static int64_t now_ns(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * (int64_t)1000000000 + now.tv_nsec;
}

/* Wait until `counter` is no longer `seen`; what it is then. */
static unsigned wait_for_change(atomic_uint *counter, unsigned seen) {
  unsigned found;
  int64_t end = 0;
  for (;;) {
    for (int i = 0; i < SPINS; i++) {
      found = atomic_load_explicit(counter, memory_order_acquire);
      if (found != seen) return found;
      rest();
    }
    int64_t now = now_ns();
    if (!end) end = now + SPIN_NS;
    if (now >= end) break;
  }
  pthread_mutex_lock(&pool.lock);
  atomic_fetch_add(&pool.asleep, 1);
  while ((found = atomic_load(counter)) == seen)
    pthread_cond_wait(&pool.wake, &pool.lock);
  atomic_fetch_sub(&pool.asleep, 1);
  pthread_mutex_unlock(&pool.lock);
  return found;
}

/* After a counter was changed. Who sleeps has said so before looking at it for the last
   time. */
static void wake_all(void) {
  if (!atomic_load(&pool.asleep)) return;
  pthread_mutex_lock(&pool.lock);
  pthread_cond_broadcast(&pool.wake);
  pthread_mutex_unlock(&pool.lock);
}

static int is_late(const Crew *crew) {
  return atomic_load_explicit(&pool.phase, memory_order_acquire) != crew->phase;
}

/* First of one's own share, then of those of the others. */
long take_piece(Crew *crew, long count) {
  if (crew->of == 1 || crew->is_alone)
    return crew->taken < count ? crew->taken++ : -1;
  crew->count = count;
  uint64_t none = (uint64_t)crew->phase << 32;
  for (; crew->tried < crew->of; crew->tried++) {
    int whose = (crew->me + crew->tried) % crew->of;
    long first = count * whose / crew->of, last = count * (whose + 1) / crew->of;
    if (first == last) continue;
    atomic_ullong *share = &pool.shares[whose].taken;
    unsigned long long found = atomic_load_explicit(share, memory_order_relaxed);
    for (;;) {
      int is_of_before = found >> 32 != crew->phase;
      if (is_of_before && is_late(crew)) return -1;
      unsigned long long now = is_of_before ? none : found;
      long piece = first + (long)(now - none);
      if (piece >= last) break;
      if (atomic_compare_exchange_weak_explicit(share, &found, now + 1,
                                                memory_order_relaxed,
                                                memory_order_relaxed)) {
        crew->taken++;
        return piece;
      }
    }
  }
  return -1;
}

void meet(Crew *crew, long next) {
  long taken = crew->taken;
  crew->tried = 0;
  crew->taken = 0;
  if (crew->of == 1) return;
  unsigned phase = crew->phase++;
  if (!crew->is_alone) {
    if (!taken || atomic_fetch_add_explicit(&pool.done, taken, memory_order_acq_rel) +
                          taken < crew->count) {
      wait_for_change(&pool.phase, phase);
      return;
    }
    atomic_store_explicit(&pool.done, 0, memory_order_relaxed);
  }
  crew->is_alone = next == 1;
  if (crew->is_alone) return;
  atomic_store(&pool.phase, phase + 1);
  wake_all();
}

static void take_part(int me) {
  Crew crew = {.me = me, .of = pool.of, .phase = pool.first_phase};
  if (me < crew.of) pool.work(&crew, pool.what);
}

typedef struct {
  int me;
  unsigned seen;
} Start;

static Start starts[MAX_THREADS];

static void *wait_for_work(void *start) {
  int me = ((Start *)start)->me;
  unsigned seen = ((Start *)start)->seen;
  for (;;) {
    seen = wait_for_change(&pool.posted, seen);
    unsigned inside = atomic_load(&pool.inside);
    while (!(inside & CLOSED) &&
           !atomic_compare_exchange_weak(&pool.inside, &inside, inside + 1)) {
    }
    if (inside & CLOSED) continue;
    take_part(me);
    if (atomic_fetch_sub(&pool.inside, 1) == (CLOSED | 1)) wake_all();
  }
  return 0;
}

/* A child process has none of the threads. */
static void forget_threads(void) {
  pthread_mutex_init(&pool.busy, 0);
  pthread_mutex_init(&pool.lock, 0);
  pthread_cond_init(&pool.wake, 0);
  pool.threads = 0;
  atomic_store(&pool.asleep, 0);
  atomic_store(&pool.done, 0);
  atomic_store(&pool.inside, CLOSED);
}

static void start_threads(int wanted) {
  static int hooked;
  if (!hooked) hooked = pthread_atfork(0, 0, forget_threads) == 0;
  while (hooked && pool.threads < wanted - 1) {
    Start *start = &starts[pool.threads];
    *start = (Start){pool.threads + 1, atomic_load(&pool.posted)};
    pthread_t thread;
    if (pthread_create(&thread, 0, wait_for_work, start) != 0) break;
    pthread_detach(thread);
    pool.threads++;
  }
}

void work_together(int threads, void (*work)(Crew *crew, void *what), void *what) {
  if (threads > MAX_THREADS) threads = MAX_THREADS;
  int shared = threads > 1 && pthread_mutex_trylock(&pool.busy) == 0;
  if (shared) start_threads(threads);
  if (!shared || pool.threads == 0) {
    Crew alone = {.of = 1};
    work(&alone, what);
  } else {
    pool.of = pool.threads + 1 < threads ? pool.threads + 1 : threads;
    pool.work = work;
    pool.what = what;
    pool.first_phase = atomic_load(&pool.phase);
    atomic_store(&pool.inside, 0);
    atomic_fetch_add(&pool.posted, 1);
    wake_all();
    take_part(0);
    unsigned inside = atomic_fetch_or(&pool.inside, CLOSED) | CLOSED;
    while (inside != CLOSED) inside = wait_for_change(&pool.inside, inside);
  }
  if (shared) pthread_mutex_unlock(&pool.busy);
}
