#include <cuda.h>
#include <cstdio>
#include <cstdlib>
#include <chrono>
#include <vector>
#include <algorithm>
#include <thread>
#include <atomic>
#define CK(x) do{CUresult r=(x); if(r){const char*s; cuGetErrorName(r,&s); printf("%s: %s\n",#x,s); exit(1);}}while(0)
static double now(){return std::chrono::duration<double,std::micro>(std::chrono::steady_clock::now().time_since_epoch()).count();}
int main(){
 CK(cuInit(0)); int n; CK(cuDeviceGetCount(&n)); std::vector<CUcontext> c(n); std::vector<CUdeviceptr> b(n); size_t L=64<<20;
 for(int i=0;i<n;i++){CUdevice d; cuDeviceGet(&d,i); CK(cuDevicePrimaryCtxRetain(&c[i],d)); CK(cuCtxSetCurrent(c[i])); CK(cuMemAlloc(&b[i],L));}
 for(int i=0;i<n;i++){cuCtxSetCurrent(c[i]); for(int j=0;j<n;j++) if(i!=j) cuCtxEnablePeerAccess(c[j],0);}
 auto run=[&](int me,bool quiet){
 cuCtxSetCurrent(c[me]); std::vector<CUstream> s(n+1); for(auto&x:s) CK(cuStreamCreate(&x,CU_STREAM_NON_BLOCKING));
 volatile unsigned*w; CUdeviceptr wd; CK(cuMemHostAlloc((void**)&w,4096,CU_MEMHOSTALLOC_PORTABLE|CU_MEMHOSTALLOC_DEVICEMAP)); CK(cuMemHostGetDevicePointer(&wd,(void*)w,0)); for(int i=0;i<1024;i++)((unsigned*)w)[i]=0; unsigned k=0;
 for(size_t nb: {size_t(1024),size_t(65536),size_t(1<<20)}) for(int mode=0;mode<7;mode++){
  std::vector<double> iss,tot; 
  for(int t=0;t<400;t++){ ++k; double a=now();
   std::vector<CUdeviceptr> to,fr; std::vector<size_t> sz; 
   for(int j=1;j<n;j++){to.push_back(b[(me+j)%n]+me*nb); fr.push_back(b[me]+32*nb/32+(L/2)); sz.push_back(nb);}
   bool local = mode!=6; if(local){to.push_back(b[me]+me*nb); fr.push_back(b[me]+L/2); sz.push_back(nb);}
   int m=to.size(), words=1;
   CUmemcpyAttributes at{}; at.srcAccessOrder=CU_MEMCPY_SRC_ACCESS_ORDER_STREAM; at.flags= mode==2?CU_MEMCPY_FLAG_DEFAULT:CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE; size_t f=0;
   if(mode==0) {for(int i=0;i<m;i++) CK(cuMemcpyAsync(to[i],fr[i],nb,s[0])); CK(cuStreamWriteValue32(s[0],wd,k,0));}
   else if(mode==1||mode==2||mode==6) {
#if CUDA_VERSION >= 13000
     CK(cuMemcpyBatchAsync(to.data(),fr.data(),sz.data(),m,&at,&f,1,s[0]));
#else
     size_t fail; CK(cuMemcpyBatchAsync(to.data(),fr.data(),sz.data(),m,&at,&f,1,&fail,s[0]));
#endif
     CK(cuStreamWriteValue32(s[0],wd,k,0));}
   else if(mode==3){ words=m; for(int i=0;i<m;i++) {CK(cuMemcpyAsync(to[i],fr[i],nb,s[i])); CK(cuStreamWriteValue32(s[i],wd+64*i,k,0));}}
   else if(mode==4){ words=m; for(int i=0;i<m;i++) CK(cuMemcpyAsync(to[i],fr[i],nb,s[i])); for(int i=0;i<m;i++) CK(cuStreamWriteValue32(s[i],wd+64*i,k,0));}
   else if(mode==5){ words=2; for(int i=0;i<m;i++) CK(cuMemcpyAsync(to[i],fr[i],nb,s[i&1])); for(int i=0;i<2;i++) CK(cuStreamWriteValue32(s[i],wd+64*i,k,0));}
   double x=now(); for(int i=0;i<words;i++) while(w[16*i]!=k); double e=now(); iss.push_back(x-a); tot.push_back(e-a);
   if(t%20==19) std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
  std::sort(iss.begin(),iss.end()); std::sort(tot.begin(),tot.end()); const char*nm[]={"one stream","batch overlap","batch default","streams copy+tell","streams copies,tells","two streams","batch without local"};
  if(!quiet) printf("%zu %-22s issue %.1f total %.1f p90 %.1f\n",nb,nm[mode],iss[200],tot[200],tot[360]);
 }};
 printf("alone\n"); run(0,false); printf("all four at once\n"); std::vector<std::thread> t; for(int i=1;i<n;i++) t.emplace_back(run,i,true); run(0,false); for(auto&x:t)x.join();
}
