#include "links/tcp/tls.hpp"

#include <sys/epoll.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "core/link.hpp"
#include "links/tcp/openssl.hpp"

namespace aiocomm::tcp {
namespace {

constexpr size_t kRecord = 16 << 10;       // the most that one TLS record carries
constexpr size_t kWriteLimit = 256 << 10;  // per call: encryption is slow enough to hold the token up

// The first queued error of this thread, which says more than the later ones.
std::string first_error(const OpenSsl& api) {
  char text[256] = "unknown error";
  if (unsigned long code = api.ERR_get_error()) api.ERR_error_string_n(code, text, sizeof text);
  api.ERR_clear_error();
  return text;
}

class TlsStream final : public Stream {
 public:
  TlsStream(UniqueFd fd, std::shared_ptr<TlsContext> context, Ssl* ssl, bool initiator)
      : Stream(std::move(fd)), api_(OpenSsl::get()), context_(std::move(context)), ssl_(ssl) {
    api_.SSL_set_fd(ssl_, this->fd());
    initiator ? api_.SSL_set_connect_state(ssl_) : api_.SSL_set_accept_state(ssl_);
  }
  ~TlsStream() override { api_.SSL_free(ssl_); }

  Io open() override {
    return call([&] { return api_.SSL_do_handshake(ssl_); });
  }

  Io read(const iovec* to, int count) override {
    size_t total = 0;
    for (int i = 0; i < count; ++i) {
      auto* at = static_cast<std::byte*>(to[i].iov_base);
      for (size_t left = to[i].iov_len; left > 0;) {
        Io io = call([&] { return api_.SSL_read(ssl_, at, static_cast<int>(std::min(left, kWriteLimit))); });
        if (io.n == 0) return total ? Io{total, 0, 0} : io;  // an error comes up again on the next call
        at += io.n;
        left -= io.n;
        total += io.n;
      }
    }
    return {total, 0, 0};
  }

  // Small parts share a record. A refused record is offered again with the same first bytes: `from` begins with them.
  Io write(const iovec* from, int count, bool) override {
    size_t total = 0, at = 0;
    for (int i = 0; i < count;) {
      if (at == from[i].iov_len) {
        ++i;
        at = 0;
        continue;
      }
      if (total >= kWriteLimit) return {total, EPOLLOUT, 0};
      auto* bytes = static_cast<const std::byte*>(from[i].iov_base) + at;
      size_t n = std::min(from[i].iov_len - at, kRecord);
      if (n < kRecord && i + 1 < count) {
        n = 0;
        for (int j = i; j < count && n < kRecord; ++j) {
          size_t skip = j == i ? at : 0, part = std::min(from[j].iov_len - skip, kRecord - n);
          std::memcpy(record_ + n, static_cast<const std::byte*>(from[j].iov_base) + skip, part);
          n += part;
        }
        bytes = record_;
      }
      Io io = call([&] { return api_.SSL_write(ssl_, bytes, static_cast<int>(n)); });
      if (io.n == 0) return {total, io.wait, io.error};
      total += io.n;
      for (at += io.n; i < count && at > from[i].iov_len; ++i) at -= from[i].iov_len;
    }
    return {total, 0, 0};
  }

  bool buffered() const override { return api_.SSL_pending(ssl_) > 0; }
  std::string reason(int error) const override {
    return error == kTlsError ? reason_ : Stream::reason(error);
  }

 private:
  template <typename F>
  Io call(F&& f) {
    NoSigpipe guard;  // the library writes to the socket by plain write()
    api_.ERR_clear_error();
    errno = 0;
    int n = f();
    int error = errno;
    if (n > 0) return {static_cast<size_t>(n), 0, 0};
    if (error == EPIPE) guard.broken();
    switch (api_.SSL_get_error(ssl_, n)) {
      case kErrorWantRead:
        return {0, EPOLLIN, 0};
      case kErrorWantWrite:
        return {0, EPOLLOUT, 0};
      case kErrorZeroReturn:
        return {0, 0, kEndOfStream};
      case kErrorSyscall:
        return {0, 0, error ? error : kEndOfStream};
      default:
        reason_ = "TLS failed: " + first_error(api_);
        if (long verdict = api_.SSL_get_verify_result(ssl_))
          reason_ +=
              std::string(" (the peer's certificate: ") + api_.X509_verify_cert_error_string(verdict) + ")";
        return {0, 0, kTlsError};
    }
  }

  const OpenSsl& api_;
  const std::shared_ptr<TlsContext> context_;
  Ssl* const ssl_;
  std::string reason_;
  std::byte record_[kRecord];
};

class Context final : public TlsContext, public std::enable_shared_from_this<Context> {
 public:
  explicit Context(const TlsFiles& files) : api_(OpenSsl::get()), ctx_(api_.SSL_CTX_new(api_.TLS_method())) {
    if (!ctx_) fail("TLS cannot be set up");
    api_.SSL_CTX_ctrl(ctx_, kCtrlMinVersion, kTls13, nullptr);
    api_.SSL_CTX_ctrl(ctx_, kCtrlMode, kPartialWrite | kMovingBuffer | kReleaseBuffers, nullptr);
    api_.SSL_CTX_set_num_tickets(ctx_, 0);
    // Frames have lengths: an end without a farewell is an end, whoever made it.
    api_.SSL_CTX_set_options(ctx_, kIgnoreUnexpectedEof);
    // Without a callback the library would ask for a passphrase on the terminal.
    api_.SSL_CTX_set_default_passwd_cb(ctx_, [](char*, int, int, void*) { return 0; });
    if (api_.SSL_CTX_use_certificate_chain_file(ctx_, files.certificate.c_str()) != 1)
      fail("tls_cert: no certificate can be read from '" + files.certificate + "'");
    const std::string& key = files.key.empty() ? files.certificate : files.key;
    if (api_.SSL_CTX_use_PrivateKey_file(ctx_, key.c_str(), kPem) != 1)
      fail("tls_key: no usable private key for the certificate in '" + key + "'");
    if (api_.SSL_CTX_check_private_key(ctx_) != 1)
      fail("tls_key: the key in '" + key + "' is not the certificate's");
    if (api_.SSL_CTX_load_verify_locations(ctx_, files.authorities.c_str(), nullptr) != 1)
      fail("tls_ca: no authorities can be read from '" + files.authorities + "'");
    api_.SSL_CTX_set_verify(ctx_, kVerifyPeer | kVerifyRequired, nullptr);
  }
  ~Context() override { api_.SSL_CTX_free(ctx_); }

  std::unique_ptr<Stream> wrap(UniqueFd fd, bool initiator) override {
    Ssl* ssl = api_.SSL_new(ctx_);
    if (!ssl) throw LinkFailure("TLS: " + first_error(api_), ENOMEM);
    return std::make_unique<TlsStream>(std::move(fd), shared_from_this(), ssl, initiator);
  }

 private:
  [[noreturn]] void fail(const std::string& what) {
    std::string why = first_error(api_);
    api_.SSL_CTX_free(ctx_);
    throw LinkFailure(what + ": " + why, EINVAL);
  }

  const OpenSsl& api_;
  SslCtx* const ctx_;
};

}  // namespace

std::shared_ptr<TlsContext> TlsContext::load(const TlsFiles& files) {
  if (files.certificate.empty() || files.authorities.empty())
    throw LinkFailure("TLS needs tls_cert and tls_ca: both sides show a certificate", EINVAL);
  return std::make_shared<Context>(files);
}

}  // namespace aiocomm::tcp
