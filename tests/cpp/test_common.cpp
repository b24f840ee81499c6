// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// Hashes against published vectors, the reader against short input, the gate against a copier.
#include <doctest/doctest.h>

#include <atomic>
#include <string>
#include <thread>

#include "common/sha256.hpp"
#include "common/wire.hpp"
#include "transport/region.hpp"

using namespace kvxfer;

namespace {
Bytes repeated(unsigned char value, size_t count) { return Bytes(count, std::byte{value}); }
}  // namespace

TEST_CASE("sha-256 gives the digests of FIPS 180-4") {
  CHECK(hex(sha256({})) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  CHECK(hex(sha256(as_bytes_view("abc"))) ==
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  CHECK(hex(sha256(as_bytes_view("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"))) ==
        "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  const std::string million(1'000'000, 'a');
  CHECK(hex(sha256(as_bytes_view(million))) ==
        "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

TEST_CASE("a digest does not depend on how the bytes were cut") {
  const std::string text(300, 'x');
  for (size_t cut = 0; cut <= text.size(); cut += 7) {
    Sha256 hash;
    hash.update(as_bytes_view(text.substr(0, cut))).update(as_bytes_view(text.substr(cut)));
    CHECK(hash.finish() == sha256(as_bytes_view(text)));
  }
}

TEST_CASE("hmac gives the digests of RFC 4231") {
  CHECK(hex(hmac_sha256(repeated(0x0b, 20), {as_bytes_view("Hi There")})) ==
        "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7");
  CHECK(hex(hmac_sha256(as_bytes_view("Jefe"),
                        {as_bytes_view("what do ya "), as_bytes_view("want for nothing?")})) ==
        "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
  CHECK(
      hex(hmac_sha256(repeated(0xaa, 131),
                      {as_bytes_view("Test Using Larger Than Block-Size Key - Hash Key First")})) ==
      "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54");
}

TEST_CASE("hkdf gives the first block of RFC 5869, test case 1") {
  Bytes salt, info;
  for (unsigned char i = 0; i <= 0x0c; ++i) salt.push_back(std::byte{i});
  for (unsigned char i = 0xf0; i <= 0xf9; ++i) info.push_back(std::byte{i});
  CHECK(hex(hkdf_sha256(repeated(0x0b, 22), salt, info)) ==
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf");
}

TEST_CASE("the reader gives zeros past the end and says so") {
  const Bytes three = repeated(0xff, 3);
  Reader r(three);
  CHECK(r.u16() == 0xffff);
  CHECK(r.ok());
  CHECK(r.u32() == 0);
  CHECK_FALSE(r.ok());
  CHECK(r.u8() == 0);  // once wrong, nothing more is read
  CHECK_FALSE(r.finished());
}

TEST_CASE("the reader refuses a text longer than its limit") {
  Bytes out;
  Writer w(out);
  w.text("abcdef");
  CHECK(Reader(out).text(6) == "abcdef");
  Reader strict(out);
  strict.text(5);
  CHECK_FALSE(strict.ok());
}

TEST_CASE("a closed gate is quiet only when the copier inside has left") {
  Gate gate;
  REQUIRE(gate.enter());
  gate.close();
  CHECK_FALSE(gate.quiet());
  CHECK(gate.wait_quiet(now_ns() + 1'000'000) == Woken::kTimedOut);
  CHECK_FALSE(gate.enter());
  CHECK_FALSE(gate.quiet());
  gate.leave();
  CHECK(gate.quiet());
  CHECK_FALSE(gate.enter());
  CHECK(gate.quiet());
}

TEST_CASE("nothing is stored behind a gate that was seen quiet") {
  for (int round = 0; round < 200; ++round) {
    Gate gate;
    int memory = 0;  // unsynchronised on purpose: the gate alone orders it (checked under tsan)
    std::thread copier([&] {
      while (gate.enter()) {
        ++memory;
        gate.leave();
      }
    });
    gate.close();
    REQUIRE(gate.wait_quiet(kNever) == Woken::kNotified);
    const int seen = memory;
    copier.join();
    CHECK(memory == seen);
  }
}

TEST_CASE("a lease covers what lies wholly inside one of its extents") {
  Lease lease;
  lease.extents = {{10, 20}, {30, 40}};
  CHECK(lease.covers(10, 10));
  CHECK(lease.covers(15, 5));
  CHECK(lease.covers(30, 1));
  CHECK_FALSE(lease.covers(9, 2));
  CHECK_FALSE(lease.covers(15, 6));
  CHECK_FALSE(lease.covers(15, 20));
  CHECK_FALSE(lease.covers(25, 1));
  CHECK_FALSE(lease.covers(0, 1));
  CHECK_FALSE(lease.covers(~uint64_t{0}, 1));
  CHECK_FALSE(lease.covers(12, ~uint64_t{0}));
}
