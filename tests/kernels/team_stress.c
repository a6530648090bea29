/* Many small pieces of work on a team of threads (team.h), to be compiled with -fsanitize=thread.
 *
 *     team_stress PIECES
 *
 * Two callers give work of random phases, parts and threads to one team of more threads than there are cores, with
 * pauses in which the team falls asleep.  A part fails the program if it is done twice, after its work has ended, or
 * before the phase in front of it has ended.  What parts read and write is plain memory, so ThreadSanitizer reports every
 * order that rests on luck.
 */
#include <stdio.h>
#include <stdlib.h>

#include "team.h"

#define CALLERS 2
#define WORK_PHASES 5
#define WORK_PARTS 9
#define WORK_THREADS 7

typedef struct {
    int64_t phases;
    uint32_t parts[WORK_PHASES];
    int done[WORK_PHASES][WORK_PARTS];
} Piece;

static void fail(const char *what) {
    fprintf(stderr, "team_stress: %s\n", what);
    _exit(1);
}

static void run_part(const void *context, int64_t phase, int64_t part, int64_t thread) {
    Piece *piece = *(Piece *const *)context;
    if (phase >= piece->phases || part >= piece->parts[phase]) fail("a part that the work does not have");
    if (thread < 0 || thread >= WORK_THREADS) fail("a thread that the work does not have");
    if (piece->done[phase][part]++) fail("a part was done twice");
    for (int64_t before = 0; before < phase; before++)
        for (uint32_t each = 0; each < piece->parts[before]; each++)
            if (piece->done[before][each] != 1) fail("a phase began before the one in front of it had ended");
}

static uint32_t draw(uint32_t *state, uint32_t below) {
    *state = *state * 1664525u + 1013904223u;
    return (*state >> 16) % below;
}

static int64_t pieces;

static void *caller(void *argument) {
    uint32_t state = (uint32_t)(intptr_t)argument + 1;
    for (int64_t i = 0; i < pieces; i++) {
        Piece *piece = calloc(1, sizeof(Piece));
        piece->phases = 1 + draw(&state, WORK_PHASES);
        for (int64_t phase = 0; phase < piece->phases; phase++) piece->parts[phase] = draw(&state, WORK_PARTS + 1);
        Piece *const context = piece; /* on the stack, as in network.c */
        work_together((Work){run_part, &context, piece->phases, 1 + draw(&state, WORK_THREADS)}, piece->parts);
        for (int64_t phase = 0; phase < piece->phases; phase++)
            for (uint32_t part = 0; part < piece->parts[phase]; part++)
                if (piece->done[phase][part] != 1) fail("work ended before its parts were done");
        free(piece);
        if (draw(&state, 64) == 0) {
            const struct timespec pause = {0, 300000};
            nanosleep(&pause, NULL);
        }
    }
    return NULL;
}

int main(int count, char **arguments) {
    pieces = count > 1 ? atoll(arguments[1]) : 1000;
    pthread_t callers[CALLERS];
    for (intptr_t i = 0; i < CALLERS; i++)
        if (pthread_create(callers + i, NULL, caller, (void *)i)) fail("no thread can be started");
    for (int i = 0; i < CALLERS; i++) pthread_join(callers[i], NULL);
    puts("done");
    return 0;
}
