#include "token_ops_kernels.h"

namespace vitrail {

const TokenKernels kTokenAvx2 = kTokenKernels;

}  // namespace vitrail
