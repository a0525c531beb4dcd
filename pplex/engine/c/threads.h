/* Threads that do one piece of work together: see threads.c. */

#include <stdatomic.h>

enum { MAX_THREADS = 256 };

/* One of the threads that work together: number `me` of `of`. */
typedef struct {
  int me, of;
  int tried, is_alone; /* shares that were looked at; does a phase of one piece */
  long taken, count;   /* pieces of this phase: by this thread, in all */
  unsigned phase;
} Crew;

/* Let `threads` threads, this one among them, do `work`: as many as there are if that is
   fewer, and this one alone where others are working together. */
void work_together(int threads, void (*work)(Crew *crew, void *what), void *what);

/* The next of `count` > 0 pieces of this phase, -1 if none is left. All of a crew ask,
   with the same count, and each piece is given once. */
long take_piece(Crew *crew, long count);

/* End the phase: all of its pieces are done, and what they wrote can be read by all. The
   next phase has `next` pieces, 0 if there is none. */
void meet(Crew *crew, long next);
