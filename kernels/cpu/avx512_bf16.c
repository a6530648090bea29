/* network.c for processors with avx512_bf16; setup.py gives the flags. */
#include "network.c"
