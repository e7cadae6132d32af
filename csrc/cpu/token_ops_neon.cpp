#include "token_ops_kernels.h"

namespace vitrail {

const TokenKernels kTokenNeon = kTokenKernels;

}  // namespace vitrail
