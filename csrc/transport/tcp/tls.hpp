// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
// TLS 1.3 with certificates on both sides, by an OpenSSL that is opened when it is asked for: one
// build serves machines with and without it.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "transport/config.hpp"
#include "transport/tcp/stream.hpp"

namespace kvxfer::tcp {

inline constexpr std::byte kTlsRecord{0x16};  // the first byte of whoever speaks TLS

// Empty when TLS can be had here, else why not.
std::optional<std::string> tls_unavailable();

class TlsStream;

// An engine's certificate, key and authority, for both roles.
class TlsContext {
 public:
  // Null when the config names no files. Throws kInvalidArgument for files that do not fit,
  // kUnavailable where there is no OpenSSL.
  static std::shared_ptr<TlsContext> make(const TransportConfig& config);
  explicit TlsContext(const TransportConfig& config);
  ~TlsContext();
  std::unique_ptr<TlsStream> wrap(Fd fd, bool is_server) const;

 private:
  void* context_ = nullptr;  // SSL_CTX
};

// One thread at a time: OpenSSL keeps one state for both directions.
class TlsStream final : public Stream {
 public:
  TlsStream(Fd fd, void* ssl, bool is_server);
  ~TlsStream() override;

  // One step of the handshake: done, waiting for the other side, or failed (the reason by
  // explain(EPROTO), and the alert is on its way to the other side).
  enum class Progress : uint8_t { kDone, kWaiting, kFailed };
  Progress handshake() noexcept;

  ssize_t send(std::span<const iovec> pieces) noexcept override;
  ssize_t receive(std::span<const iovec> pieces) noexcept override;
  ssize_t drop(size_t nbytes) noexcept override;
  bool flush() noexcept override;
  bool shared() const noexcept override { return false; }
  ByteView binding() const noexcept override { return binding_; }
  std::string explain(int err) const override;
  std::string describe() const override { return description_; }

 private:
  ssize_t read_some(std::byte* out, size_t nbytes) noexcept;
  bool pull() noexcept;  // false: errno, or 0 for the end
  void failed() noexcept;

  void* ssl_;
  // Memory BIOs, owned by ssl_: encrypted bytes from and to the socket.
  void *incoming_, *outgoing_;
  Bytes scratch_;  // one read of the socket; small until the handshake is done
  Bytes unsent_;   // what the socket did not take
  size_t unsent_begin_ = 0, unsent_end_ = 0;
  Bytes binding_;
  bool answered_plainly_ = false;
  std::string error_, description_;
};

}  // namespace kvxfer::tcp
