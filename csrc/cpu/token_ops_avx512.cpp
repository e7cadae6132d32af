#include "token_ops_kernels.h"

namespace vitrail {

const TokenKernels kTokenAvx512 = kTokenKernels;

}  // namespace vitrail
