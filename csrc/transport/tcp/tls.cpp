// SPDX-FileCopyrightText: The kvxfer authors
// SPDX-License-Identifier: Apache-2.0
#include "transport/tcp/tls.hpp"

#include <dlfcn.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>

#include "common/error.hpp"
#include "transport/tcp/wire.hpp"

namespace kvxfer::tcp {
namespace {

// The few functions of OpenSSL 3 that are used, with its opaque types as void*, so that no header
// is needed. The numbers are part of its stable ABI.
constexpr int kVersionTls13 = 0x0304, kVerifyPeer = 1, kVerifyFailIfNone = 2, kFilePem = 1;
constexpr int kCtrlMode = 33, kCtrlSessionCache = 44, kCtrlMaxCertList = 51, kCtrlMinVersion = 123;
constexpr long kModePartialWrite = 1, kModeReleaseBuffers = 0x10;
constexpr int kErrorSsl = 1, kErrorWantRead = 2, kErrorZeroReturn = 6;
constexpr long kMaxCertificateBytes = 16 * 1024;  // of a stranger's chain, before it is verified
constexpr size_t kRecordBytes = 16 * 1024;
constexpr size_t kBatchBytes = 256 * 1024;  // encrypted in one go, sent by one system call
constexpr size_t kBindingBytes = 32;
constexpr char kExporterLabel[] = "EXPORTER-kvxfer-session";

struct OpenSsl {
  void* (*TLS_method)();
  void* (*SSL_CTX_new)(void*);
  void (*SSL_CTX_free)(void*);
  long (*SSL_CTX_ctrl)(void*, int, long, void*);
  int (*SSL_CTX_set_num_tickets)(void*, size_t);
  void (*SSL_CTX_set_verify)(void*, int, void*);
  int (*SSL_CTX_use_certificate_chain_file)(void*, const char*);
  void (*SSL_CTX_set_default_passwd_cb)(void*, int (*)(char*, int, int, void*));
  void (*SSL_CTX_set_default_passwd_cb_userdata)(void*, void*);
  int (*SSL_CTX_use_PrivateKey_file)(void*, const char*, int);
  int (*SSL_CTX_check_private_key)(void*);
  int (*SSL_CTX_load_verify_locations)(void*, const char*, const char*);
  void* (*SSL_new)(void*);
  void (*SSL_free)(void*);
  void (*SSL_set_bio)(void*, void*, void*);
  void (*SSL_set_accept_state)(void*);
  void (*SSL_set_connect_state)(void*);
  int (*SSL_do_handshake)(void*);
  int (*SSL_read_ex)(void*, void*, size_t, size_t*);
  int (*SSL_write_ex)(void*, const void*, size_t, size_t*);
  int (*SSL_get_error)(void*, int);
  long (*SSL_get_verify_result)(void*);
  int (*SSL_export_keying_material)(void*, unsigned char*, size_t, const char*, size_t,
                                    const unsigned char*, size_t, int);
  const void* (*SSL_get_current_cipher)(void*);
  const char* (*SSL_CIPHER_get_name)(const void*);
  void* (*BIO_s_mem)();
  void* (*BIO_new)(void*);
  int (*BIO_read)(void*, void*, int);
  int (*BIO_write)(void*, const void*, int);
  size_t (*BIO_ctrl_pending)(void*);
  unsigned long (*ERR_get_error)();
  void (*ERR_clear_error)();
  const char* (*ERR_reason_error_string)(unsigned long);
  const char* (*X509_verify_cert_error_string)(long);
  std::string missing;  // why it cannot be used

  OpenSsl() {
    // Never closed: OpenSSL registers exit handlers that must still find its code.
    void* library = ::dlopen("libssl.so.3", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      missing = cat("OpenSSL 3 is not installed (", ::dlerror(), ")");
      return;
    }
    auto find = [&](auto& function, const char* name) {
      void* symbol = ::dlsym(library, name);  // finds those of libcrypto too, which it depends on
      if (symbol == nullptr && missing.empty()) missing = cat("libssl.so.3 lacks ", name);
      function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(symbol);
    };
#define KVXFER_FIND(name) find(name, #name)
    KVXFER_FIND(TLS_method), KVXFER_FIND(SSL_CTX_new), KVXFER_FIND(SSL_CTX_free);
    KVXFER_FIND(SSL_CTX_ctrl), KVXFER_FIND(SSL_CTX_set_num_tickets);
    KVXFER_FIND(SSL_CTX_set_verify), KVXFER_FIND(SSL_CTX_use_certificate_chain_file);
    KVXFER_FIND(SSL_CTX_use_PrivateKey_file), KVXFER_FIND(SSL_CTX_check_private_key);
    KVXFER_FIND(SSL_CTX_set_default_passwd_cb);
    KVXFER_FIND(SSL_CTX_set_default_passwd_cb_userdata);
    KVXFER_FIND(SSL_CTX_load_verify_locations), KVXFER_FIND(SSL_new), KVXFER_FIND(SSL_free);
    KVXFER_FIND(SSL_set_bio), KVXFER_FIND(SSL_set_accept_state);
    KVXFER_FIND(SSL_set_connect_state), KVXFER_FIND(SSL_do_handshake), KVXFER_FIND(SSL_read_ex);
    KVXFER_FIND(SSL_write_ex), KVXFER_FIND(SSL_get_error), KVXFER_FIND(SSL_get_verify_result);
    KVXFER_FIND(SSL_export_keying_material), KVXFER_FIND(SSL_get_current_cipher);
    KVXFER_FIND(SSL_CIPHER_get_name), KVXFER_FIND(BIO_s_mem), KVXFER_FIND(BIO_new);
    KVXFER_FIND(BIO_read), KVXFER_FIND(BIO_write), KVXFER_FIND(BIO_ctrl_pending);
    KVXFER_FIND(ERR_get_error), KVXFER_FIND(ERR_clear_error);
    KVXFER_FIND(ERR_reason_error_string), KVXFER_FIND(X509_verify_cert_error_string);
#undef KVXFER_FIND
  }
};

const OpenSsl& openssl() {
  static const OpenSsl library;
  return library;
}

// OpenSSL asks for the password of an encrypted key, and by itself would do so on the terminal.
int no_password(char*, int, int, void* was_asked) {
  *static_cast<bool*>(was_asked) = true;
  return -1;
}

// Alerts by which a peer refuses a certificate (RFC 8446, 6.2).
bool is_about_certificate(unsigned long alert) {
  constexpr unsigned long kBad = 42, kUnknown = 46, kUnknownCa = 48, kAccessDenied = 49;
  constexpr unsigned long kRequired = 116;
  return (alert >= kBad && alert <= kUnknown) || alert == kUnknownCa || alert == kAccessDenied ||
         alert == kRequired;
}

// What OpenSSL has to say about the last call of this thread.
std::string last_error(bool* certificate_refused = nullptr) {
  constexpr unsigned long kReasonMask = 0x7FFFFF, kLibraryShift = 23, kLibraryMask = 0xFF;
  constexpr unsigned long kLibrarySsl = 20, kAlerts = 1000;  // an alert's reason: 1000 + its number
  std::string out;
  while (const unsigned long code = openssl().ERR_get_error()) {
    const unsigned long reason_number = code & kReasonMask;
    if (certificate_refused != nullptr && (code >> kLibraryShift & kLibraryMask) == kLibrarySsl &&
        reason_number >= kAlerts && is_about_certificate(reason_number - kAlerts))
      *certificate_refused = true;
    const char* reason = openssl().ERR_reason_error_string(code);
    if (reason != nullptr && out.find(reason) == std::string::npos)
      out += cat(out.empty() ? "" : "; ", reason);
  }
  return out.empty() ? "no reason given" : out;
}

}  // namespace

std::optional<std::string> tls_unavailable() {
  if (openssl().missing.empty()) return {};
  return openssl().missing;
}

// ---------------------------------------------------------------- context

std::shared_ptr<TlsContext> TlsContext::make(const TransportConfig& config) {
  const bool some =
      !config.tls_certificate.empty() || !config.tls_key.empty() || !config.tls_authority.empty();
  if (!some) return {};
  if (config.tls_certificate.empty() || config.tls_key.empty() || config.tls_authority.empty())
    fail(Code::kInvalidArgument,
         "TLS needs three files: certificate, key and authority; both sides prove who they are");
  if (auto reason = tls_unavailable()) fail(Code::kUnavailable, "TLS was asked for, but ", *reason);
  return std::make_shared<TlsContext>(config);
}

TlsContext::TlsContext(const TransportConfig& config) {
  const OpenSsl& o = openssl();
  o.ERR_clear_error();
  context_ = o.SSL_CTX_new(o.TLS_method());
  if (context_ == nullptr) fail(Code::kUnavailable, "SSL_CTX_new failed: ", last_error());
  auto need = [&](bool ok, const char* what, const std::string& path) {
    if (ok) return;
    const std::string reason = last_error();
    o.SSL_CTX_free(context_);
    fail(Code::kInvalidArgument, "the TLS ", what, " '", path, "' cannot be used: ", reason);
  };
  o.SSL_CTX_ctrl(context_, kCtrlMinVersion, kVersionTls13, nullptr);
  o.SSL_CTX_ctrl(context_, kCtrlMode, kModePartialWrite | kModeReleaseBuffers, nullptr);
  o.SSL_CTX_ctrl(context_, kCtrlMaxCertList, kMaxCertificateBytes, nullptr);
  o.SSL_CTX_ctrl(context_, kCtrlSessionCache, 0, nullptr);
  o.SSL_CTX_set_num_tickets(context_, 0);  // nothing is resumed: each lane proves itself anew
  o.SSL_CTX_set_verify(context_, kVerifyPeer | kVerifyFailIfNone, nullptr);
  const auto &certificate = config.tls_certificate, &key = config.tls_key,
             &authority = config.tls_authority;
  bool is_encrypted = false;
  o.SSL_CTX_set_default_passwd_cb(context_, &no_password);
  o.SSL_CTX_set_default_passwd_cb_userdata(context_, &is_encrypted);
  need(o.SSL_CTX_use_certificate_chain_file(context_, certificate.c_str()) == 1, "certificate",
       certificate);
  const bool has_key = o.SSL_CTX_use_PrivateKey_file(context_, key.c_str(), kFilePem) == 1;
  if (is_encrypted) {
    o.SSL_CTX_free(context_);
    fail(Code::kInvalidArgument, "the TLS key '", key,
         "' is encrypted, and nobody is asked for its password; give one that is not "
         "(openssl pkey -in KEY -out PLAIN, readable by its user alone)");
  }
  need(has_key, "key", key);
  need(o.SSL_CTX_check_private_key(context_) == 1, "key (it is not the certificate's)", key);
  need(o.SSL_CTX_load_verify_locations(context_, authority.c_str(), nullptr) == 1, "authority",
       authority);
}

TlsContext::~TlsContext() { openssl().SSL_CTX_free(context_); }

std::unique_ptr<TlsStream> TlsContext::wrap(Fd fd, bool is_server) const {
  void* ssl = openssl().SSL_new(context_);
  if (ssl == nullptr) fail(Code::kUnavailable, "SSL_new failed: ", last_error());
  return std::make_unique<TlsStream>(std::move(fd), ssl, is_server);
}

// ---------------------------------------------------------------- stream

TlsStream::TlsStream(Fd fd, void* ssl, bool is_server) : Stream(std::move(fd)), ssl_(ssl) {
  const OpenSsl& o = openssl();
  incoming_ = o.BIO_new(o.BIO_s_mem());
  outgoing_ = o.BIO_new(o.BIO_s_mem());
  o.SSL_set_bio(ssl_, incoming_, outgoing_);
  is_server ? o.SSL_set_accept_state(ssl_) : o.SSL_set_connect_state(ssl_);
  scratch_.resize(4 * 1024);
}

TlsStream::~TlsStream() { openssl().SSL_free(ssl_); }

void TlsStream::failed() noexcept {
  if (answered_plainly_) {
    error_ =
        "the engine there does not speak TLS, and this one speaks nothing else; give tls= to "
        "both, or to neither";
    return;
  }
  const long verdict = openssl().SSL_get_verify_result(ssl_);
  bool ours_refused = false;
  error_ = cat("TLS: ", last_error(&ours_refused));
  if (verdict != 0)
    error_ += cat(": the other side's certificate was refused: ",
                  openssl().X509_verify_cert_error_string(verdict),
                  "; look at its tls.certificate, and at tls.authority here");
  if (ours_refused)
    error_ +=
        ": the other side refused this engine's certificate; look at tls.certificate here (who "
        "signed it, its dates), and at tls.authority there";
}

TlsStream::Progress TlsStream::handshake() noexcept {
  const OpenSsl& o = openssl();
  for (;;) {
    o.ERR_clear_error();
    const int rc = o.SSL_do_handshake(ssl_);
    const int why = rc == 1 ? 0 : o.SSL_get_error(ssl_, rc);
    if (rc != 1 && why != kErrorWantRead) failed();
    if (!flush() && errno != EAGAIN) {
      if (error_.empty()) error_ = errno_text(errno);
      return Progress::kFailed;
    }
    if (rc == 1) {
      binding_.resize(kBindingBytes);
      o.SSL_export_keying_material(ssl_, reinterpret_cast<unsigned char*>(binding_.data()),
                                   binding_.size(), kExporterLabel, sizeof kExporterLabel - 1,
                                   nullptr, 0, 0);
      scratch_.resize(kBatchBytes / 4);
      description_ = cat("TLS 1.3, ", o.SSL_CIPHER_get_name(o.SSL_get_current_cipher(ssl_)));
      return Progress::kDone;
    }
    if (why != kErrorWantRead) return Progress::kFailed;
    if (pull()) continue;
    if (errno == EAGAIN) return Progress::kWaiting;
    error_ = errno == 0 ? "the other side went away during the TLS handshake" : errno_text(errno);
    return Progress::kFailed;
  }
}

// One read of the socket, handed to OpenSSL.
bool TlsStream::pull() noexcept {
  for (;;) {
    const ssize_t n = ::recv(fd_.get(), scratch_.data(), scratch_.size(), MSG_DONTWAIT);
    if (n > 0) {
      // An engine without TLS says so in the clear. We never fall back to that.
      if (binding_.empty() && scratch_[0] == kPlainHead) answered_plainly_ = true;
      openssl().BIO_write(incoming_, scratch_.data(), static_cast<int>(n));
      return true;
    }
    if (n == 0) errno = 0;
    if (n == 0 || errno != EINTR) return false;
  }
}

ssize_t TlsStream::read_some(std::byte* out, size_t nbytes) noexcept {
  const OpenSsl& o = openssl();
  for (;;) {
    o.ERR_clear_error();
    size_t n = 0;
    const int rc = o.SSL_read_ex(ssl_, out, nbytes, &n);
    if (rc == 1) return static_cast<ssize_t>(n);
    const int why = o.SSL_get_error(ssl_, rc);
    if (why == kErrorZeroReturn) return 0;
    if (why != kErrorWantRead) {
      failed();
      errno = EPROTO;
      return -1;
    }
    if (!pull()) return errno == 0 ? 0 : -1;
  }
}

ssize_t TlsStream::receive(std::span<const iovec> pieces) noexcept {
  ssize_t total = 0;
  for (const iovec& piece : pieces) {
    size_t done = 0;
    while (done < piece.iov_len) {
      const ssize_t n =
          read_some(static_cast<std::byte*>(piece.iov_base) + done, piece.iov_len - done);
      // An end or an error after some bytes is found again by the next call.
      if (n <= 0) return total > 0 ? total : n;
      done += static_cast<size_t>(n);
      total += n;
    }
  }
  return total;
}

ssize_t TlsStream::drop(size_t nbytes) noexcept {
  std::byte nowhere[kRecordBytes];
  return read_some(nowhere, std::min(nbytes, sizeof nowhere));
}

bool TlsStream::flush() noexcept {
  const OpenSsl& o = openssl();
  for (;;) {
    if (unsent_begin_ == unsent_end_) {
      const size_t pending = o.BIO_ctrl_pending(outgoing_);
      if (pending == 0) return true;
      if (unsent_.size() < pending) unsent_.resize(pending);
      unsent_begin_ = 0;
      unsent_end_ = static_cast<size_t>(
          std::max(0, o.BIO_read(outgoing_, unsent_.data(), static_cast<int>(pending))));
    }
    const ssize_t n = ::send(fd_.get(), unsent_.data() + unsent_begin_, unsent_end_ - unsent_begin_,
                             MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n >= 0)
      unsent_begin_ += static_cast<size_t>(n);
    else if (errno != EINTR)
      return false;
  }
}

ssize_t TlsStream::send(std::span<const iovec> pieces) noexcept {
  if (!flush()) return -1;
  const OpenSsl& o = openssl();
  std::byte record[kRecordBytes];  // small pieces share a record
  size_t total = 0, filled = 0;
  auto encrypt = [&](const void* data, size_t nbytes) {
    while (nbytes > 0) {
      size_t n = 0;
      o.ERR_clear_error();
      if (o.SSL_write_ex(ssl_, data, nbytes, &n) != 1) {  // memory: it never has to wait
        failed();
        errno = EPROTO;
        return false;
      }
      data = static_cast<const std::byte*>(data) + n;
      nbytes -= n;
    }
    return true;
  };
  for (const iovec& piece : pieces) {
    auto* from = static_cast<const std::byte*>(piece.iov_base);
    size_t left = std::min(piece.iov_len, kBatchBytes - total);
    total += left;
    while (left > 0) {
      if (filled == 0 && left >= kRecordBytes) {
        if (!encrypt(from, kRecordBytes)) return -1;
        from += kRecordBytes, left -= kRecordBytes;
        continue;
      }
      const size_t n = std::min(left, kRecordBytes - filled);
      std::copy_n(from, n, record + filled);
      filled += n, from += n, left -= n;
      if (filled == kRecordBytes) {
        if (!encrypt(record, filled)) return -1;
        filled = 0;
      }
    }
    if (total == kBatchBytes) break;
  }
  if (filled > 0 && !encrypt(record, filled)) return -1;
  // Taken, even if the socket is full now: the rest goes out by the next flush().
  if (!flush() && errno != EAGAIN) return -1;
  return static_cast<ssize_t>(total);
}

std::string TlsStream::explain(int err) const {
  return err == EPROTO && !error_.empty() ? error_ : errno_text(err);
}

}  // namespace kvxfer::tcp
