/* network.c for processors with avx2; setup.py gives the flags. */
#include "network.c"
