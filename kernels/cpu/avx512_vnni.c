/* network.c for processors with avx512_vnni; setup.py gives the flags. */
#include "network.c"
