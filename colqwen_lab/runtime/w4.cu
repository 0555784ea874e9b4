// The small-M GEMM of 4-bit weights in the layout of humming-kernels (symmetric, groups of 128).
//
// codes  [in/16][out/64][32 lanes][4 words]: word j of a lane is its fragment of the 16 x 16 tile j
//        of mma.m16n8k16. Nibbles i and i + 4 are the two columns of register {0, 2, 1, 3}[i].
// scales [in/128][out/64][8][8] bf16: a lane with row r = lane / 4 has those of rows r, r + 8, ...

typedef unsigned int u32;

__device__ inline u32 shared_of(const void *at) { return (u32)__cvta_generic_to_shared(at); }

// Copies by the bulk copy engine, which reports `bytes` to `barrier`.
__device__ inline void copy(void *to, const void *from, u32 bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(shared_of(to)), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}

// Waits for the copies of this block.
__device__ inline void wait_for_copies(u32 barrier) {
  asm volatile("{\n.reg .pred done;\nagain: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], 0;\n@!done bra again;\n}"
               ::"r"(barrier) : "memory");
}

// Waits for the data of all blocks of the cluster.
__device__ inline void wait_for_cluster(u32 barrier) {
  asm volatile("{\n.reg .pred done;\nagain: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0;\n"
               "@!done bra again;\n}" ::"r"(barrier) : "memory");
}

// Initialises a barrier that expects `bytes`, visible to the cluster.
__device__ inline void expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;\n"
               "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ inline uint4 read_once(const uint4 *from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
  return v;
}

// The codes at bits 4 * PLACE of both halves of a word as bf16: (128 + code - 136) x the row's scale.
template <int PLACE>
__device__ inline u32 weights_of(u32 word, u32 scale) {
  u32 whole, value, result;
  asm("lop3.b32 %0, %1, 0x000f000f, 0x43004300, 0xea;" : "=r"(whole) : "r"(word >> (4 * PLACE)));
  asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(value) : "r"(whole), "r"(0x43084308));
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(value), "r"(scale));
  return result;
}

__device__ inline void multiply_add(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline u32 rounded(float low, float high) {
  u32 result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}

// The small-M GEMM: out [rows, out] = x [rows, in] times the weights. A cluster of SPLIT blocks
// computes 64 outputs. Each block takes a part of the inputs, and each of its WARPS takes STEPS
// steps of 16 inputs. A warp reads every code once, into registers, AHEAD steps before it is needed.
// With GATED the first half of the outputs is the gate and the second half is up: out [rows, out / 2]
// is SiLU of the gate times up.
template <int INS, int OUTS, int TILES, int WARPS, int SPLIT, int AHEAD, int GATED, int BLOCKS_PER_SM>
__global__ void __cluster_dims__(SPLIT, 1, 1) __launch_bounds__(WARPS * 32, BLOCKS_PER_SM)
small_m(const uint4 *__restrict__ codes, const uint4 *__restrict__ scales, const char *__restrict__ x,
        u32 *__restrict__ out, int rows) {
  constexpr int BLOCKS = GATED ? 2 : 1, ALL = OUTS / 64, APART = ALL / 2;
  constexpr int STEPS = INS / 16 / WARPS / SPLIT;
  constexpr int SAME = STEPS % 8 == 0 ? 8 : STEPS % 4 == 0 ? 4 : STEPS % 2 == 0 ? 2 : 1;  // steps that share a scale
  constexpr int GROUPS = SAME == 8 ? STEPS / 8 : (STEPS + 7 - SAME) / 8 + 1;
  constexpr int STRIDE = STEPS * 32 + 16;  // bytes of one row of x in the memory of a warp
  constexpr int LINE = 68;                 // floats from one row of partial sums to the next
  extern __shared__ __align__(128) char memory[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int rank = blockIdx.x % SPLIT, block = blockIdx.x / SPLIT;
  const int first = (rank * WARPS + warp) * STEPS, group = first / 8;

  const uint4 *from = codes + ((long long)first * ALL + block) * 32 + lane;
  uint4 ahead[AHEAD][BLOCKS];
#pragma unroll
  for (int i = 0; i < AHEAD; i++)
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) ahead[i][b] = read_once(from + (i * ALL + b * APART) * 32);

  // The memory of a warp: a barrier (two for the first warp), scales, then its part of x, later its
  // partial sums. After the warps: sums gathered from the cluster.
  const int share = max(rows * STRIDE, BLOCKS * rows * LINE * 4) + 127 & ~127;
  const int apart = (128 + BLOCKS * GROUPS * 128 + share) / 8;
  char *warp_memory = memory + warp * apart * 8;
  char *scale_lines = warp_memory + 128, *tokens_at = scale_lines + BLOCKS * GROUPS * 128;
  float2 *gathered = (float2 *)(memory + WARPS * apart * 8);  // [SPLIT][rows of this block][BLOCKS][32]
  const int own = (rows + SPLIT - 1) / SPLIT;
  const u32 barrier = shared_of(warp_memory), gathering = shared_of(memory + 64);
  if (lane == 0) expect(barrier, rows * STEPS * 32 + BLOCKS * GROUPS * 128);
  if (SPLIT > 1 && threadIdx.x == 0) expect(gathering, (rows + SPLIT - 1 - rank) / SPLIT * SPLIT * BLOCKS * 256);
  __syncwarp();
  if (SPLIT > 1) asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  if (lane < BLOCKS * GROUPS) {
    const int line = min(group + lane % GROUPS, INS / 128 - 1);
    copy(scale_lines + lane * 128, scales + (line * ALL + block + lane / GROUPS * APART) * 8, 128, barrier);
  }
  for (int row = lane; row < rows; row += 32)
    copy(tokens_at + row * STRIDE, x + ((long long)row * INS + first * 16) * 2, STEPS * 32, barrier);

  u32 at[TILES];
#pragma unroll
  for (int t = 0; t < TILES; t++)
    at[t] = shared_of(tokens_at) + lane / 8 % 2 * 16 + min(t * 8 + lane % 8, rows - 1) * STRIDE;
  float sums[TILES][BLOCKS][4][4];
#pragma unroll
  for (int i = 0; i < TILES * BLOCKS * 16; i++) ((float *)sums)[i] = 0.f;
  wait_for_copies(barrier);

  u32 scale[BLOCKS][4][2];
#pragma unroll
  for (int i = 0; i < STEPS; i++) {
    if (i % SAME == 0) {
#pragma unroll
      for (int b = 0; b < BLOCKS; b++) {
        const uint4 line = *(const uint4 *)(scale_lines + (b * GROUPS + (first + i) / 8 - group) * 128 + lane / 4 * 16);
        const u32 both[4] = {line.x, line.y, line.z, line.w};
#pragma unroll
        for (int j = 0; j < 4; j++)
          scale[b][j][0] = __byte_perm(both[j], 0, 0x1010), scale[b][j][1] = __byte_perm(both[j], 0, 0x3232);
      }
    }
    u32 tokens[TILES][2];
#pragma unroll
    for (int t = 0; t < TILES; t++)
      asm("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
          : "=r"(tokens[t][0]), "=r"(tokens[t][1]) : "r"(at[t] + i * 32) : "memory");
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
      const uint4 now = ahead[i % AHEAD][b];
      if (i + AHEAD < STEPS) ahead[i % AHEAD][b] = read_once(from + ((i + AHEAD) * ALL + b * APART) * 32);
      const u32 words[4] = {now.x, now.y, now.z, now.w};
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const u32 a[4] = {weights_of<0>(words[j], scale[b][j][0]), weights_of<2>(words[j], scale[b][j][1]),
                          weights_of<1>(words[j], scale[b][j][0]), weights_of<3>(words[j], scale[b][j][1])};
#pragma unroll
        for (int t = 0; t < TILES; t++) multiply_add(sums[t][b][j], a, tokens[t][0], tokens[t][1]);
      }
    }
  }
  __syncwarp();
  float *partial = (float *)tokens_at;
#pragma unroll
  for (int t = 0; t < TILES; t++)
#pragma unroll
    for (int c = 0; c < 4; c++) {
      const int token = t * 8 + lane % 4 * 2 + c % 2;
      if (token < rows)
#pragma unroll
        for (int b = 0; b < BLOCKS; b++)
#pragma unroll
          for (int j = 0; j < 4; j++)
            partial[(b * rows + token) * LINE + j * 16 + c / 2 * 8 + lane / 4] = sums[t][b][j][c];
    }
  if (SPLIT > 1) asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
  __syncthreads();

  // A warp sums a row over the warps. With SPLIT, the row's block then sums over the cluster.
  const auto finish = [&](int token, const float2(&sum)[BLOCKS]) {
    const long long place = (long long)token * (OUTS / BLOCKS / 2) + block * 32 + lane;
    const float2 value = sum[0], up = sum[BLOCKS - 1];
    out[place] = GATED ? rounded(value.x / (1.f + __expf(-value.x)) * up.x, value.y / (1.f + __expf(-value.y)) * up.y)
                       : rounded(value.x, value.y);
  };
  for (int token = warp; token < rows; token += WARPS) {
    float2 totals[BLOCKS];
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
      const float2 *place = (const float2 *)((const float *)(memory + 128 + BLOCKS * GROUPS * 128) + (b * rows + token) * LINE) + lane;
      totals[b] = place[0];
#pragma unroll
      for (int w = 1; w < WARPS; w++) totals[b].x += place[w * apart].x, totals[b].y += place[w * apart].y;
      if (SPLIT > 1) {
        const u32 here = shared_of(gathered + ((rank * own + token / SPLIT) * BLOCKS + b) * 32 + lane);
        asm volatile("{\n.reg .b32 there, barrier;\nmapa.shared::cluster.u32 there, %0, %2;\n"
                     "mapa.shared::cluster.u32 barrier, %1, %2;\n"
                     "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [there], {%3, %4}, [barrier];\n}"
                     ::"r"(here), "r"(gathering), "r"(token % SPLIT), "f"(totals[b].x), "f"(totals[b].y) : "memory");
      }
    }
    if (SPLIT == 1) finish(token, totals);
  }
  if (SPLIT > 1) {
    wait_for_cluster(gathering);
    for (int token = rank + warp * SPLIT; token < rows; token += WARPS * SPLIT) {
      float2 totals[BLOCKS];
#pragma unroll
      for (int b = 0; b < BLOCKS; b++) {
        const float2 *place = gathered + (token / SPLIT * BLOCKS + b) * 32 + lane;
        totals[b] = place[0];
#pragma unroll
        for (int r = 1; r < SPLIT; r++) totals[b].x += place[r * own * BLOCKS * 32].x, totals[b].y += place[r * own * BLOCKS * 32].y;
      }
      finish(token, totals);
    }
  }
}
