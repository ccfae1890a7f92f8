// The part of OpenSSL's interface that is used here, the same in 1.1.1 and 3, found at run time.
#pragma once

namespace aiocomm::tcp {

struct Ssl;     // SSL
struct SslCtx;  // SSL_CTX

struct OpenSsl {
  const void* (*TLS_method)();
  SslCtx* (*SSL_CTX_new)(const void*);
  void (*SSL_CTX_free)(SslCtx*);
  long (*SSL_CTX_ctrl)(SslCtx*, int, long, void*);
  unsigned long (*SSL_CTX_set_options)(SslCtx*, unsigned long);
  int (*SSL_CTX_set_num_tickets)(SslCtx*, unsigned long);
  int (*SSL_CTX_use_certificate_chain_file)(SslCtx*, const char*);
  int (*SSL_CTX_use_PrivateKey_file)(SslCtx*, const char*, int);
  int (*SSL_CTX_check_private_key)(const SslCtx*);
  int (*SSL_CTX_load_verify_locations)(SslCtx*, const char*, const char*);
  void (*SSL_CTX_set_verify)(SslCtx*, int, void*);
  void (*SSL_CTX_set_default_passwd_cb)(SslCtx*, int (*)(char*, int, int, void*));
  Ssl* (*SSL_new)(SslCtx*);
  void (*SSL_free)(Ssl*);
  int (*SSL_set_fd)(Ssl*, int);
  void (*SSL_set_connect_state)(Ssl*);
  void (*SSL_set_accept_state)(Ssl*);
  int (*SSL_do_handshake)(Ssl*);
  int (*SSL_read)(Ssl*, void*, int);
  int (*SSL_write)(Ssl*, const void*, int);
  int (*SSL_pending)(const Ssl*);
  int (*SSL_get_error)(const Ssl*, int);
  long (*SSL_get_verify_result)(const Ssl*);
  const char* (*X509_verify_cert_error_string)(long);
  unsigned long (*ERR_get_error)();
  void (*ERR_clear_error)();
  void (*ERR_error_string_n)(unsigned long, char*, unsigned long);

  static const OpenSsl& get();  // throws LinkFailure where there is none
};

constexpr int kCtrlMode = 33, kCtrlMinVersion = 123;
constexpr unsigned long kIgnoreUnexpectedEof = 1ul << 7;  // unused in 1.1.1
constexpr long kPartialWrite = 1, kMovingBuffer = 2, kReleaseBuffers = 16;
constexpr long kTls13 = 0x0304;
constexpr int kPem = 1, kVerifyPeer = 1, kVerifyRequired = 2;
constexpr int kErrorWantRead = 2, kErrorWantWrite = 3, kErrorSyscall = 5, kErrorZeroReturn = 6;

}  // namespace aiocomm::tcp
