#include "links/tcp/openssl.hpp"

#include <dlfcn.h>

#include <cerrno>
#include <string>
#include <type_traits>

#include "core/link.hpp"

namespace aiocomm::tcp {
namespace {

OpenSsl load() {
  void* library = nullptr;
  for (const char* name : {"libssl.so.3", "libssl.so.1.1"})
    if ((library = ::dlopen(name, RTLD_NOW | RTLD_LOCAL))) break;
  if (!library)
    throw LinkFailure("TLS is configured, but neither libssl.so.3 nor libssl.so.1.1 is installed", ENOENT);
  OpenSsl api{};
  auto find = [&](auto& function, const char* name) {
    void* symbol = ::dlsym(library, name);  // libcrypto's, too: it came with libssl
    if (!symbol) throw LinkFailure(std::string("the installed OpenSSL has no ") + name, ENOSYS);
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(symbol);
  };
#define FIND(name) find(api.name, #name)
  FIND(TLS_method);
  FIND(SSL_CTX_new);
  FIND(SSL_CTX_free);
  FIND(SSL_CTX_ctrl);
  FIND(SSL_CTX_set_options);
  FIND(SSL_CTX_set_num_tickets);
  FIND(SSL_CTX_use_certificate_chain_file);
  FIND(SSL_CTX_use_PrivateKey_file);
  FIND(SSL_CTX_check_private_key);
  FIND(SSL_CTX_load_verify_locations);
  FIND(SSL_CTX_set_verify);
  FIND(SSL_CTX_set_default_passwd_cb);
  FIND(SSL_new);
  FIND(SSL_free);
  FIND(SSL_set_fd);
  FIND(SSL_set_connect_state);
  FIND(SSL_set_accept_state);
  FIND(SSL_do_handshake);
  FIND(SSL_read);
  FIND(SSL_write);
  FIND(SSL_pending);
  FIND(SSL_get_error);
  FIND(SSL_get_verify_result);
  FIND(X509_verify_cert_error_string);
  FIND(ERR_get_error);
  FIND(ERR_clear_error);
  FIND(ERR_error_string_n);
#undef FIND
  return api;
}

}  // namespace

const OpenSsl& OpenSsl::get() {
  static const OpenSsl api = load();  // after a failure the next call tries again
  return api;
}

}  // namespace aiocomm::tcp
