/* network.c for processors with avx_vnni; setup.py gives the flags. */
#include "network.c"
