// Who arrives at an mbarrier on behalf of a warp, in the decode kernels.
//
// One lane arrives for its warp, after __syncwarp. racecheck does not see that order, so for it
// (tests/gpu/sanitize.py) every lane arrives.
#pragma once
#include "ptx.cuh"

#if defined(EVERY_LANE_ARRIVES)
constexpr int ARRIVALS = 32;
DEVICE bool arrives() { return true; }
#else
constexpr int ARRIVALS = 1;  // of a warp
DEVICE bool arrives() { return lane_index() == 0; }
#endif
