// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// The handshake, both roles, against somebody who knows the protocol, perhaps the secret, and what
// was said before: frames in any order, changed, cut, repeated, reflected, of another session,
// split anywhere. A session comes about if and only if every proof is right.
#include "transport/tcp/handshake.hpp"

#include <sys/socket.h>

#include <array>
#include <optional>

#include "common/error.hpp"
#include "handshake_host.hpp"

using namespace kvxfer;
using namespace kvxfer::tcp;
using kvxfer::fuzz::HandshakeHost;
using kvxfer::fuzz::Input;
using kvxfer::fuzz::same;

namespace {

constexpr size_t kNumSockets = 6;
constexpr int kMaxSteps = 48;
constexpr size_t kMaxAnswer = 8 * 1024;  // all that one stranger may be told
const Bytes kSecret(32, std::byte{0x11}), kOther(32, std::byte{0x22});

TransportConfig with_lanes(uint32_t num_lanes) {
  TransportConfig config;
  config.num_lanes = num_lanes;
  return config;
}

// The frame as it is sent: itself, or what a man in the middle makes of it.
Bytes changed(Input& input, Bytes frame) {
  const uint8_t how = input.u8();
  switch (how < 0xa0 || frame.empty() ? 0 : how & 7) {
    case 1:
      frame[input.u16() % frame.size()] ^= std::byte(1u << (how >> 3 & 7));
      break;
    case 2:
      frame[input.u16() % frame.size()] = std::byte(input.u8());
      break;
    case 3:
      frame.resize(input.u16() % frame.size());
      break;
    case 4: {
      const ByteView more = input.take(input.u8());
      frame.insert(frame.end(), more.begin(), more.end());
      break;
    }
    case 5:
      frame.insert(frame.end(), frame.begin(), frame.end());
      break;
    case 6: {
      const ByteView instead = input.take(input.u8());
      frame.assign(instead.begin(), instead.end());
      break;
    }
    default:
      break;
  }
  return frame;
}

Hello some_hello(Input& input) {
  Hello hello;
  const uint8_t how = input.u8();
  hello.num_lanes = 1 + (how & 3);
  hello.self.name.assign(input.u8(), 'n');
  hello.self.incarnation[0] = std::byte((how & 4) != 0 ? 7 : 8);  // 7: the engine itself
  if ((how & 8) != 0) hello.min_version = input.u16(), hello.max_version = input.u16();
  if ((how & 16) != 0) hello.num_lanes = input.u32();
  if ((how & 32) != 0) hello.features = input.u64();
  hello.nonce = input.get<Digest>();
  return hello;
}

// The first whole frame in `bytes`, of the given type.
std::optional<ByteView> frame_in(ByteView bytes, Type type) {
  if (bytes.size() < kHeadBytes) return {};
  const auto head = decode_head(bytes.first(kHeadBytes), kMaxHandshakeBytes);
  if (!head || head->type != type || bytes.size() < kHeadBytes + head->control_nbytes) return {};
  return bytes.first(kHeadBytes + head->control_nbytes);
}

// ---------------------------------------------------------------- strangers at the acceptor's door

struct Stranger {
  Fd fd;
  std::weak_ptr<FdHandler> door;  // the acceptor's handler, while it has one
  Bytes said, heard;              // all of it
  Bytes opening;                  // the HELLO frame as it was sent
  bool greeted = false;           // keys are known
  Keys keys;
  Transcript transcript;
};

class Door {
 public:
  explicit Door(uint32_t num_lanes) : transport_(host_, kSecret, with_lanes(num_lanes)) {}
  ~Door() {
    for (Stranger& each : strangers_) {
      each.fd.reset();
      knock(each);
      knock(each);  // the first may have found bytes
      FUZZ_CHECK(each.door.expired());
    }
  }

  void step(Input& input) {
    const uint8_t what = input.u8();
    Stranger& who = strangers_[what % kNumSockets];
    switch (what / kNumSockets % 8) {
      case 0:
        return say(who, input, changed(input, encode_hello(some_hello(input))));
      case 1:
        return say(who, input, auth(who, input));
      case 2:
      case 3:
        return say(who, input, join(input));
      case 4: {  // what somebody said before
        const Stranger& other = strangers_[input.u8() % kNumSockets];
        return say(who, input, other.said);
      }
      case 5:
        return say(who, input, who.heard);  // reflected
      case 6:
        who.fd.reset();
        return knock(who);
      default: {
        const ByteView bytes = input.take(input.u8());
        return say(who, input, {bytes.begin(), bytes.end()});
      }
    }
  }

  // Each new session's every proof must be one that was made with the secret, for this session.
  void check() {
    for (; num_checked_ < host_.sessions.size(); ++num_checked_) {
      const Session& session = host_.sessions[num_checked_];
      const auto of = std::ranges::find_if(strangers_, [&](const Stranger& each) {
        return each.greeted && each.keys.session_id == session.id;
      });
      FUZZ_CHECK(of != strangers_.end() && session.key == of->keys.session);
      const Bytes proof = proof_of(*of, kSecret);
      const ByteView said(of->said);
      FUZZ_CHECK(said.size() >= of->opening.size() + proof.size());
      FUZZ_CHECK(same(said.first(of->opening.size()), of->opening));
      FUZZ_CHECK(same(said.subspan(of->opening.size(), proof.size()), proof));
    }
  }

  // Without anybody's interference it must come about, however the bytes are split.
  void honest(Input& input) {
    Stranger& main = strangers_[0];
    Hello hello;
    hello.self.incarnation[0] = std::byte{8};
    hello.num_lanes = 2;
    say_split(main, input, encode_hello(hello));
    FUZZ_CHECK(main.greeted);
    say_split(main, input, proof_of(main, kSecret));
    const auto answer = decode_hello(frame_in(main.heard, Type::kHello)->subspan(kHeadBytes));
    for (uint32_t lane = 1; lane <= answer->num_lanes; ++lane)
      say_split(strangers_[lane], input, lane_of(main, lane));
    FUZZ_CHECK(host_.sessions.size() == 1 && host_.num_turned_away == 0);
  }

 private:
  static Bytes proof_of(const Stranger& who, ByteView secret) {
    const auto answer = frame_in(who.heard, Type::kHello);
    const auto theirs = decode_hello(answer->subspan(kHeadBytes));
    const auto ours = decode_hello(frame_in(who.opening, Type::kHello)->subspan(kHeadBytes));
    Transcript transcript;
    transcript.add(*frame_in(who.opening, Type::kHello));
    transcript.add(*answer);
    return encode_plain(Type::kAuth, client_proof(derive_keys(secret, *ours, *theirs), transcript));
  }
  Bytes auth(Stranger& who, Input& input) {
    const bool knows = (input.u8() & 3) != 0;
    if (!who.greeted) return changed(input, encode_plain(Type::kAuth, input.take(32)));
    return changed(input, proof_of(who, knows ? kSecret : kOther));
  }
  static Bytes lane_of(const Stranger& main, uint32_t lane) {
    const Digest proof = lane_proof(main.keys.session, main.keys.session_id, lane, {});
    return encode_join({main.keys.session_id, lane, proof});
  }
  Bytes join(Input& input) {
    const uint8_t how = input.u8();
    const Stranger& main = strangers_[how % kNumSockets];
    return changed(input, lane_of(main, how < 0xf0 ? how / 6u % 5u : input.u32()));
  }

  void say(Stranger& who, Input& input, Bytes bytes) {
    (input.u8() & 1) != 0 ? say_split(who, input, bytes) : say_part(who, bytes);
  }
  void say_split(Stranger& who, Input& input, const Bytes& bytes) {
    for (ByteView left(bytes); !left.empty();) {
      const size_t n = std::min<size_t>(left.size(), 1 + input.u8());
      say_part(who, left.first(n));
      left = left.subspan(n);
    }
  }
  void say_part(Stranger& who, ByteView bytes) {
    if (!who.fd) arrive(who);
    if (bytes.empty() || who.said.size() > 16 * 1024) return;
    // It may have been hung up on: then nobody hears it.
    const ssize_t n = ::send(who.fd.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n > 0) who.said.insert(who.said.end(), bytes.begin(), bytes.begin() + n);
    knock(who);
    hear(who);
    check();
  }
  void arrive(Stranger& who) {
    who = {};
    int ends[2];
    FUZZ_CHECK(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, ends) == 0);
    who.fd = Fd(ends[0]);
    who.door = transport_.take(Fd(ends[1]));
  }
  void knock(Stranger& who) {
    if (const auto door = who.door.lock()) door->on_events(0);
  }
  void hear(Stranger& who) {
    std::byte bytes[4096];
    for (ssize_t n; (n = ::recv(who.fd.get(), bytes, sizeof bytes, MSG_DONTWAIT)) > 0;)
      who.heard.insert(who.heard.end(), bytes, bytes + n);
    FUZZ_CHECK(who.heard.size() <= kMaxAnswer);
    const auto answer = frame_in(who.heard, Type::kHello);
    if (who.greeted || !answer) return;
    // It answers only what it could read, so this is what it was told.
    const auto opening = frame_in(who.said, Type::kHello);
    FUZZ_CHECK(opening);
    who.opening.assign(opening->begin(), opening->end());
    const auto ours = decode_hello(opening->subspan(kHeadBytes));
    const auto theirs = decode_hello(answer->subspan(kHeadBytes));
    FUZZ_CHECK(ours && theirs && theirs->min_version == kVersion);
    who.keys = derive_keys(kSecret, *ours, *theirs);
    who.greeted = true;
  }

  HandshakeHost host_;
  TcpTransport transport_;
  std::array<Stranger, kNumSockets> strangers_;
  size_t num_checked_ = 0;
};

// ---------------------------------------------------------------- an impostor that we connect to

// What the other side of all streams of one connect() does.
class Impostor {
 public:
  Impostor(Input& input, ByteView earlier) : input_(input), earlier_(earlier), how_(input.u8()) {}

  void hear(bool bulk, std::span<const iovec> pieces) {
    for (const iovec& piece : pieces) {
      const auto* bytes = static_cast<const std::byte*>(piece.iov_base);
      if (!bulk) heard_.insert(heard_.end(), bytes, bytes + piece.iov_len);
    }
  }
  size_t tell(std::span<const iovec> pieces) {
    if (at_ == told_.size() && phase_ < 3) answer();
    const size_t n = std::min({told_.size() - at_, pieces[0].iov_len,
                               (how_ & 1) != 0 ? size_t{1} + input_.u8() : told_.size()});
    if (n > 0) std::memcpy(pieces[0].iov_base, told_.data() + at_, n);
    at_ += n;
    return n;
  }
  // Whether it said what only somebody who knows the secret could say.
  bool proved() const { return proved_; }
  bool honest() const { return honest_; }
  const Bytes& told() const { return told_; }

 private:
  void answer() {
    Bytes right;
    switch (phase_) {
      case 0: {
        const auto opening = frame_in(heard_, Type::kHello);
        FUZZ_CHECK(opening);  // ours is well-formed
        Hello hello = some_hello(input_);
        honest_ = hello.min_version == 1 && hello.max_version == 1 && hello.num_lanes >= 1 &&
                  hello.num_lanes <= 2 && hello.self.name.size() <= 256;
        right = encode_hello(hello);
        break;
      }
      case 1:
        right = proof();
        break;
      default:
        right = encode_plain(Type::kOffer, input_.take(input_.u8()));
        break;
    }
    const uint8_t how = input_.u8();
    Bytes sent = right;
    if (how >= 0xc0) {
      const auto again = [&](ByteView bytes) { sent.assign(bytes.begin(), bytes.end()); };
      switch (how & 3) {
        case 0:
          sent = changed(input_, std::move(sent));
          break;
        case 1:
          again(heard_);  // reflected
          break;
        case 2:
          again(earlier_.first(std::min<size_t>(earlier_.size(), input_.u16())));  // replayed
          break;
        default:
          sent = encode_failure(Type::kError, 0, {.code = Code::kTransport, .text = "no"});
      }
    }
    honest_ &= same(sent, right);
    if (phase_ == 1)
      proved_ = sent.size() >= right.size() && !right.empty() &&
                same(ByteView(sent).first(right.size()), right) && knows_;
    told_.insert(told_.end(), sent.begin(), sent.end());
    ++phase_;
  }
  // The server's proof over what was really said.
  Bytes proof() {
    const auto opening = frame_in(heard_, Type::kHello), answer = frame_in(told_, Type::kHello);
    if (!answer) return {};
    const auto ours = decode_hello(opening->subspan(kHeadBytes));
    const auto theirs = decode_hello(answer->subspan(kHeadBytes));
    const auto auth = frame_in(ByteView(heard_).subspan(opening->size()), Type::kAuth);
    if (!theirs || !auth) return {};
    Transcript transcript;
    transcript.add(*opening), transcript.add(*answer), transcript.add(*auth);
    knows_ = (input_.u8() & 3) != 0;
    honest_ &= knows_;
    const Keys keys = derive_keys(knows_ ? kSecret : kOther, *ours, *theirs);
    return encode_plain(Type::kAuth, server_proof(keys, transcript));
  }

  Input& input_;
  const ByteView earlier_;
  const uint8_t how_;
  Bytes heard_, told_;
  size_t at_ = 0;
  int phase_ = 0;
  bool knows_ = false, proved_ = false, honest_ = false;
};

class ImpostorStream final : public Stream {
 public:
  ImpostorStream(Impostor& other, bool bulk) : Stream(Fd{}), other_(other), bulk_(bulk) {}
  ssize_t send(std::span<const iovec> pieces) noexcept override {
    other_.hear(bulk_, pieces);
    size_t sum = 0;
    for (const iovec& piece : pieces) sum += piece.iov_len;
    return static_cast<ssize_t>(sum);
  }
  ssize_t receive(std::span<const iovec> pieces) noexcept override {
    return bulk_ ? 0 : static_cast<ssize_t>(other_.tell(pieces));  // 0: the stream has ended
  }

 private:
  Impostor& other_;
  const bool bulk_;
};

void connect(Input& input) {
  HandshakeHost host;
  TcpTransport transport(host, kSecret, with_lanes(2));
  Bytes earlier;
  for (int round = 0; round < 2; ++round) {
    Impostor other(input, earlier);
    const auto dial = [&](bool bulk) { return std::make_unique<ImpostorStream>(other, bulk); };
    bool established = false;
    try {
      const auto out = transport.establish(dial, Patience(kNever), [&](const PeerIdentity& who) {
        FUZZ_CHECK(other.proved() && who.name.size() <= 256);
        return true;
      });
      FUZZ_CHECK(out.connection && other.proved());
      established = true;
    } catch (const Error& error) {
      FUZZ_CHECK(error.code != Code::kInternal && error.what()[0] != '\0');
    }
    FUZZ_CHECK(established || !other.honest());
    earlier = other.told();
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input input(data, size);
  const uint8_t role = input.u8();
  if (role % 4 == 0) {
    connect(input);
    return 0;
  }
  Door door(1 + (role >> 6));
  if (role % 4 == 1)
    door.honest(input);
  else
    for (int i = 0; i < kMaxSteps && !input.empty(); ++i) door.step(input);
  return 0;
}
