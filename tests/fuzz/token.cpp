// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// A lease token, which an application may carry by any way it likes: it is refused or it is exactly
// what was granted.
#include "engine/control.hpp"
#include "fuzz.hpp"

using namespace kvxfer;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const ByteView bytes{reinterpret_cast<const std::byte*>(data), size};
  if (const auto token = decode_token(bytes)) {
    FUZZ_CHECK(token->lease.id != 0 && size <= kMaxTokenBytes);
    FUZZ_CHECK(fuzz::same(encode_token(*token), bytes));
  }
  // And built from the input, it survives.
  fuzz::Input input(data, size);
  Token token;
  token.owner = input.get<Incarnation>();
  token.lease = {input.u64() | 1, input.get<Key>()};
  const auto again = decode_token(encode_token(token));
  FUZZ_CHECK(again && again->owner == token.owner && again->lease.id == token.lease.id);
  FUZZ_CHECK(again->lease.key == token.lease.key);
  return 0;
}
