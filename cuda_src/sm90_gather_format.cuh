// The formats of a 16-bit cache whose rows are gathered one by one, of values of the type of q:
//
//   FORMAT_16BIT_512   1024 bytes: 512 values, all of them V
//   without it         1152 bytes: 576 values, of which V is the first 512
//
// GATHER is the name of the kernel.
#pragma once

// ROW_BYTES: from a row of a page to the next. A column block is 64 columns, 128 bytes of a row.
#if defined(FORMAT_16BIT_512)
constexpr int ROW_BYTES = 1024, COLUMN_BLOCKS = 8;
#else
constexpr int ROW_BYTES = 1152, COLUMN_BLOCKS = 9;
#endif
constexpr int LAUNCH_SHARED_BYTES = 226160;

// Seven column blocks of Q are kept in registers, and the others, its tail, in shared memory.
constexpr int Q_TAIL_BLOCKS = COLUMN_BLOCKS - 7;
// Registers of a thread by role: a thread block has 512 a lane, and 160 are of each matrix
// warpgroup.
constexpr int SOFTMAX_REGISTERS = 168, MATRIX_REGISTERS = 160;
constexpr int GATHER_REGISTERS = 512 - SOFTMAX_REGISTERS - 2 * MATRIX_REGISTERS;
