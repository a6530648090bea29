/* network.c for processors with avx512; setup.py gives the flags. */
#include "network.c"
