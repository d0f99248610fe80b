// The same kernel as a program, for the sanitizers: its job (sizes and buffers) comes from a file and goes back to it.
#undef thread
#undef double
#include <cstdlib>

int main(int argc, char** argv) {
  FILE* file = argc == 2 ? fopen(argv[1], "rb") : nullptr;
  uint64_t head[8], argument_bytes[32], lengths[64]; // number of buffers, grid, threadgroup, seed
  if (!file || fread(head, 8, 8, file) != 8 || fread(argument_bytes, 8, 32, file) != 32 || head[0] > 64) return 2;
  void* buffers[64];
  const uint64_t n_buffers = head[0];
  for (uint64_t i = 0; i < n_buffers; i++) {
    if (fread(&lengths[i], 8, 1, file) != 1) return 2;
    buffers[i] = malloc(lengths[i]); // exactly as long as the array, so that its end is watched
    if (fread(buffers[i], 1, lengths[i], file) != lengths[i]) return 2;
  }
  fclose(file);
  const uint grid[3] = {uint(head[1]), uint(head[2]), uint(head[3])};
  const uint threadgroup_size[3] = {uint(head[4]), uint(head[5]), uint(head[6])};
  char error[600] = "";
  if (msl_run(buffers, grid, threadgroup_size, argument_bytes, int(head[7]), error, sizeof error)) {
    fprintf(stderr, "%s\n", error);
    return 3;
  }
  file = fopen(argv[1], "wb");
  for (uint64_t i = 0; i < n_buffers; i++) fwrite(buffers[i], 1, lengths[i], file);
  fclose(file);
  _Exit(0); // what the sanitizers say at exit concerns the fibers, not the kernel
}
